"""From a loaded model and a requested precision to the runner that serves it, and what its weights are held in."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from services.inference.engine import probe
from services.inference.engine.fused_lora import Product
from services.inference.engine.llama import LlamaRunner, has_llama_architecture, products
from services.inference.engine.lora_linear import linear_products
from services.inference.engine.packed import PackedPrecision, unusable
from services.inference.engine.runner import ModelRunner
from services.inference.engine.transformers_runner import TransformersRunner
from services.inference.precision import ServingPrecision
from shared.datasets.tokens import Tokenizer
from shared.errors import TunesmithError
from shared.jobs.spec import BasePrecision
from shared.logs import get_logger

_CANDIDATES: tuple[PackedPrecision, ...] = ("fp16w", "bf16w", "int8w")
# What each requested precision is packed as on a CPU; bitsandbytes' int8 is ten times slower there than plain fp32.
_PACKED: dict[str, PackedPrecision] = {each: each for each in _CANDIDATES} | {"int8": "int8w"}
_log = get_logger("engine")


@dataclass(frozen=True, slots=True)
class Chosen:
    """A runner and how it was chosen.

    Attributes:
        precision: what the weights are really held in.
        backend: whose forward pass runs: `llama` is ours.
        measured: the probe's measurements; empty if there was nothing to choose.
    """

    runner: ModelRunner
    precision: str
    backend: Literal["llama", "transformers"]
    measured: list[probe.Measured] = field(default_factory=list)


def default_precision(device: str) -> ServingPrecision:
    """What is served where nothing was asked for: fp32 takes a GPU twice the memory and a multiple of the time."""
    return "fp32" if device == "cpu" else "auto"


def precision_to_load(requested: ServingPrecision, device: str, gpu_dtype: BasePrecision = "bf16") -> BasePrecision:
    """What the base is read as, before it is packed.

    Raises:
        TunesmithError: this device cannot serve in the requested precision; the message names those that it can.
    """
    if device != "cpu":
        if requested == "auto":
            return gpu_dtype
        if requested in _PACKED and requested != "int8":
            raise TunesmithError(
                f"precision {requested} is for CPUs; on a GPU there are auto, bf16, fp16, fp32, int8 and nf4",
                code="unsupported_precision",
            )
        return requested  # type: ignore[return-value]
    if requested == "auto":
        return "fp32"
    if requested not in _PACKED:
        return requested  # type: ignore[return-value]
    reason = unusable(_PACKED[requested])
    if reason is not None:
        raise _unsupported(requested, reason)
    return "fp32"


def choose_runner(
    model: Any,
    loaded_as: BasePrecision,
    requested: ServingPrecision,
    tokenizer: Tokenizer,
    *,
    rows: int,
    context: int,
    adapter_slots: int,
) -> Chosen:
    """The fastest runner that serves this model in the requested precision.

    Args:
        loaded_as: the result of `precision_to_load`.

    Raises:
        TunesmithError: the architecture is not served, or not in this precision.
    """
    if not has_llama_architecture(model):
        if loaded_as != requested and requested != "auto":
            raise TunesmithError(
                f"precision {requested} on a CPU needs a base of the Llama architecture in full precision",
                code="unsupported_precision",
            )
        runner = TransformersRunner(model, rows=rows, context=context, adapter_slots=adapter_slots)
        return Chosen(runner, loaded_as, "transformers")
    measured: list[probe.Measured] = []
    packed: PackedPrecision = "plain"
    if loaded_as == "fp32" and requested == "auto":
        measured = probe.measure(model, tokenizer.encode(probe.TEXT, add_special_tokens=True), _CANDIDATES)
        packed = probe.fastest(measured)
    elif loaded_as == "fp32":
        packed = _PACKED.get(requested, "plain")
    try:
        own = LlamaRunner(model, precision=packed, rows=rows, context=context, adapter_slots=adapter_slots)
    except RuntimeError as error:
        if packed == "plain":
            raise
        if requested != "auto":
            raise _unsupported(requested, str(error)) from error
        _log.warning("precision left out", precision=packed, error=str(error))
        packed = "plain"
        own = LlamaRunner(model, precision=packed, rows=rows, context=context, adapter_slots=adapter_slots)
    precision = loaded_as if packed == "plain" else packed
    _log.info("runner chosen", backend="llama", precision=precision, requested=requested)
    return Chosen(own, precision, "llama", measured)


def products_of(model: Any) -> list[Product]:
    """What adapters are added to, as the runner chosen for this model computes it."""
    return products(model.model.layers) if has_llama_architecture(model) else linear_products(model)


def _unsupported(requested: ServingPrecision, reason: str) -> TunesmithError:
    """The sentence for whoever asked by name: why not, and what this processor can serve in."""
    there_are: list[str] = [
        each for each in get_args(ServingPrecision) if each not in _PACKED or unusable(_PACKED[each]) is None
    ]
    others = ", ".join(each for each in there_are if each != requested)
    return TunesmithError(
        f"precision {requested} does not run on this processor: {reason}; there are {others}",
        code="unsupported_precision",
    )
