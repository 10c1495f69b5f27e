"""From a loaded model and a wished precision to the runner that serves it, and what it is held in."""

from dataclasses import dataclass, field
from typing import Any, Literal

from services.inference.engine import probe
from services.inference.engine.llama import LlamaRunner, in_family
from services.inference.engine.packed import PackedPrecision
from services.inference.engine.runner import ModelRunner
from services.inference.engine.transformers_runner import TransformersRunner
from services.inference.precision import ServingPrecision
from shared.datasets.tokens import Tokenizer
from shared.errors import TunesmithError
from shared.jobs.spec import BasePrecision
from shared.logs import get_logger

_PACKED: tuple[PackedPrecision, ...] = ("fp16w", "bf16w", "int8w")
_log = get_logger("engine")


@dataclass(frozen=True, slots=True)
class Chosen:
    """A runner and how it came about.

    Attributes:
        precision: what the weights are really held in.
        kind: `llama` (our forward pass) or `transformers`.
        measured: what the probe saw; empty if nothing was to choose.
    """

    runner: ModelRunner
    precision: str
    kind: Literal["llama", "transformers"]
    measured: list[probe.Measured] = field(default_factory=list)


def precision_to_load(wished: ServingPrecision, device: str, gpu_dtype: BasePrecision = "bf16") -> BasePrecision:
    """What the base is read as, before it is packed.

    On CPU 8-bit is ours: bitsandbytes' kernel is ten times slower there than plain fp32.

    Raises:
        TunesmithError: a precision for processors was asked for on a GPU.
    """
    if device == "cpu":
        return "fp32" if wished in ("auto", "int8", *_PACKED) else wished  # type: ignore[return-value]
    if wished == "auto":
        return gpu_dtype
    if wished in _PACKED:
        raise TunesmithError(f"precision {wished} is for processors; on a GPU use int8, bf16, fp16 or auto")
    return wished  # type: ignore[return-value]


def choose_runner(
    model: Any,
    loaded_as: BasePrecision,
    wished: ServingPrecision,
    tokenizer: Tokenizer,
    *,
    rows: int,
    context: int,
    adapter_slots: int,
) -> Chosen:
    """The fastest runner that serves this model as wished.

    Args:
        loaded_as: what `precision_to_load` said.

    Raises:
        TunesmithError: the architecture is not served, or not in this precision.
    """
    if not in_family(model):
        if loaded_as != wished and wished != "auto":
            raise TunesmithError(f"precision {wished} on a processor needs a Llama-family base in full precision")
        runner = TransformersRunner(model, rows=rows, context=context, adapter_slots=adapter_slots)
        return Chosen(runner, loaded_as, "transformers")
    measured: list[probe.Measured] = []
    packed: PackedPrecision = "plain"
    if loaded_as != wished and loaded_as == "fp32":
        if wished == "auto":
            measured = probe.measure(model, tokenizer.encode(probe.TEXT, add_special_tokens=True), _PACKED)
            packed = probe.fastest(measured)
        else:
            packed = next((each for each in _PACKED if each == wished), "int8w")
    own = LlamaRunner(model, precision=packed, rows=rows, context=context, adapter_slots=adapter_slots)
    precision = loaded_as if packed == "plain" else packed
    _log.info("runner chosen", kind="llama", precision=precision, wished=wished)
    return Chosen(own, precision, "llama", measured)
