"""What a step asks of a GPU, counted without one: `python -m benchmarks.launches` (`make bench-launches`).

Training and decode steps run at TinyLlama's and Llama-3-8B's real shapes on tensors without numbers: FakeTensorMode, or
the meta device. Counted are calls of aten that launch work (views and allocations are none; some launch more than one
kernel), reads by the host, each of which waits for the card, and the bytes that a training forward keeps for its
gradient. No time is measured: the counts are the same on every machine. Tests hold them.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.initialization import no_init_weights

from benchmarks.llama_shapes import LLAMA_3_8B, TINYLLAMA_1B
from services.inference.engine.interface import Sampling
from services.inference.engine.llama import LlamaRunner
from services.inference.engine.lora import LoraWeights
from services.inference.engine.sampling import Chooser, choose
from services.trainer.model.forward import Packed, loss_sum, pack, training_forward
from services.trainer.model.llama import FusedLlama
from services.trainer.model.lora import lora_attached, trainable
from services.trainer.model.precision import Precision
from services.trainer.recipe.step import take_step
from shared.bases.base_model import library_versions, quiet_libraries
from shared.jobs.spec import PRESETS, LoraSpec

RESULTS = Path(__file__).parent / "results" / "launches.json"
Shape = dict[str, int]
SHAPES: dict[str, Shape] = {"tinyllama": TINYLLAMA_1B, "llama-3-8b": LLAMA_3_8B}
# Rows of one micro-batch, a third of each being its prompt.
LENGTHS = (512, 300, 512, 200)
ROWS, CONTEXT, RANK = 16, 1_024, 8
# What one layer takes is the difference between these: the last one is computed for few tokens.
_LAYERS = (2, 3)
_CPU = torch.device("cpu")
_ALLOCATE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "resize_")


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the calls that give a device work, by their names."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.calls.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _gives_work(func):
            self.calls[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def _gives_work(func: Any) -> bool:
    namespace, name = func._schema.name.split("::")
    if namespace == "prim" or name in _ALLOCATE:
        return False
    returned = [each.alias_info for each in func._schema.returns]
    return not returned or any(alias is None or alias.is_write for alias in returned)


class Reads(TorchFunctionMode):
    """Counts how often the host asks a tensor for its numbers; tensors without numbers answer with ones.

    What reads by another way raises, under FakeTensorMode and on the meta device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._going_on = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _READS:
            self._going_on = self._going_on and func in _WALKS
            return func(*args, **(kwargs or {}))
        self.count += not self._going_on
        tensor: Tensor = args[0]
        if tensor.is_meta:
            return torch.ones(tensor.shape, dtype=tensor.dtype).tolist()
        if not isinstance(tensor, FakeTensor):
            return func(*args, **(kwargs or {}))
        # `FakeTensor.tolist` reads number by number what a real tensor gives at once.
        self._going_on = True
        return 1.0 if tensor.is_floating_point() else 1


_READS = frozenset({Tensor.tolist, Tensor.item, Tensor.__float__, Tensor.__int__, Tensor.__bool__})
# What `FakeTensor.tolist` calls on its way from one number to the next.
_WALKS = frozenset({Tensor.__iter__, Tensor.unbind, Tensor.dim, Tensor.is_floating_point})


class Kept:
    """Bytes that autograd saves, the same memory once, weights not counted."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {_memory(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        self._saved: dict[int, Any] = {}

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._saved.values())

    def note(self, tensor: Tensor) -> Tensor:
        if _memory(tensor) not in self._weights:
            # Held, so that no later tensor gets its address.
            self._saved[_memory(tensor)] = tensor.untyped_storage()
        return tensor.detach()


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True, slots=True)
class TrainingCost:
    """What one step of one micro-batch asks for.

    Attributes:
        forward, backward: launches of one layer more.
        around: launches of the step that no layer accounts for: embedding, loss, clipping; the optimizer's own apart.
        reads: by the host, in the whole step.
        kept: bytes for each token that the forward pass of all layers keeps.
    """

    forward: int
    backward: int
    around: int
    reads: int
    kept: float


@dataclass(frozen=True, slots=True)
class _Step:
    """Launches of the forward pass, the backward pass and the whole step; reads; bytes kept for each token."""

    forward: int
    backward: int
    whole: int
    reads: int
    kept: float


def training(shape: Shape, lora: LoraSpec, held: str = "bf16") -> TrainingCost:
    """A training step as a GPU computes it, in bf16; what is kept is that of all the shape's layers.

    Args:
        held: `bf16` or `int8`, how the base is held.
    """
    few, more = (_step(shape | {"num_hidden_layers": layers}, lora, held) for layers in _LAYERS)
    forward, backward = more.forward - few.forward, more.backward - few.backward
    kept = few.kept + (shape["num_hidden_layers"] - _LAYERS[0]) * (more.kept - few.kept)
    return TrainingCost(forward, backward, few.whole - _LAYERS[0] * (forward + backward), few.reads, kept)


def _step(shape: Shape, lora: LoraSpec, held: str) -> _Step:
    with _adapted(shape, lora, held) as (model, packed):
        kept = Kept(model)
        with torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor), _bf16():
            # An int8 base computes its scales once, in its first forward pass.
            loss_sum(model, packed)
        with Launches() as forward, _bf16():
            loss = loss_sum(model, packed)
        with Launches() as backward:
            torch.autograd.backward(loss)
        # AdamW counts its steps in tensors on the host, which fake ones cannot be told from the device's.
        parameters = trainable(model)
        optimizer = torch.optim.SGD(parameters.values())
        with Reads() as reads, Launches() as whole:
            take_step(
                model,
                parameters,
                optimizer,
                [packed],
                learning_rate=1e-3,
                max_grad_norm=1.0,
                precision=Precision(_CPU, torch.bfloat16, _bf16, None),
                check=lambda: None,
            )
    return _Step(forward.total, backward.total, whole.total, reads.count, kept.bytes / packed.tokens)


_bf16 = partial(torch.autocast, "cpu", torch.bfloat16)


@contextmanager
def _adapted(shape: Shape, lora: LoraSpec, held: str) -> Iterator[tuple[Any, Packed]]:
    """A fake base that computes as on a GPU, LoRA attached, and a micro-batch for it; under FakeTensorMode.

    Its device is the CPU: autograd does not run on fake tensors of a device that torch was not built for.
    """
    base = _without_numbers(shape)
    rows = [(np.full(length, 5), np.arange(length) > length // 3) for length in LENGTHS]
    with lora_attached(base, lora, 1) as model, training_forward(model, dropout=True), FakeTensorMode():
        _fill(model)
        _hold(base, held)
        base.fused = FusedLlama(base, torch.bfloat16, as_gpu=True)
        yield model, pack(rows, _CPU)


def _without_numbers(shape: Shape) -> Any:
    """transformers' Llama in bf16 on the meta device: peft casts what it adds, which fake tensors do not bear."""
    with no_init_weights(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def _fill(model: nn.Module) -> None:
    """Give a model fake tensors for its own, in place; under FakeTensorMode."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            fake = torch.empty(weight.shape, dtype=weight.dtype)
            setattr(module, name, nn.Parameter(fake, requires_grad=weight.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _hold(base: Any, held: str) -> None:
    """As `make_trainable` leaves a base: embeddings and norms in fp32, linear layers as they are held."""
    for name, module in base.named_modules():
        weight = getattr(module, "weight", None)
        if name == "lm_head" or "lora" in name or weight is None or hasattr(module, "base_layer"):
            continue
        if not isinstance(module, nn.Linear):
            # Not `float()`: it cannot exchange a fake parameter for another.
            module.weight = nn.Parameter(weight.float(), requires_grad=False)
        elif held == "int8":
            module.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
            module.weight.SCB = torch.empty(len(weight))  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """What one decode step asks for.

    Attributes:
        layer, around, choice: launches of one layer more, of what no layer accounts for, and of choosing the tokens.
        reads: by the host, in the whole step.
    """

    layer: int
    around: int
    choice: int
    reads: int


def decode(shape: Shape, slots: Sequence[int], choosers: Sequence[Chooser]) -> DecodeCost:
    """A decode step with its choice of tokens, the rows using the adapters in `slots`; 0 is the base."""
    few, more = (_decode(shape | {"num_hidden_layers": layers}, slots, choosers) for layers in _LAYERS)
    layer = more.around - few.around
    return DecodeCost(layer, few.around - _LAYERS[0] * layer, few.choice, few.reads)


def _decode(shape: Shape, slots: Sequence[int], choosers: Sequence[Chooser]) -> DecodeCost:
    # Of the meta device, which is not the CPU: fake tensors of a device that torch was not built for have no slices.
    with torch.inference_mode():
        model = _without_numbers(shape)
        runner = LlamaRunner(model, precision="plain", rows=len(slots), context=CONTEXT, adapter_slots=max(1, *slots))
        for slot in sorted(set(slots) - {0}):
            runner.lora.write(slot, runner.lora.prepare(_adapter(runner)))
        step: Callable[[], Tensor] = partial(
            runner.decode, 0, [5] * len(slots), list(range(200, 200 + len(slots))), slots
        )
        # The first step copies to each row the adapter that it uses.
        step()
        with Reads() as reads:
            with Launches() as forward:
                logits = step()
            with Launches() as choice:
                choose(logits, choosers)
    return DecodeCost(0, forward.total, choice.total, reads.count)


def _adapter(runner: LlamaRunner) -> LoraWeights:
    pairs = {
        path: (torch.empty(RANK, fan_in, dtype=runner.dtype), torch.empty(fan_out, RANK, dtype=runner.dtype))
        for path, (fan_in, fan_out) in runner.lora.modules.items()
        if path.endswith(("q_proj", "v_proj"))
    }
    return LoraWeights(RANK, pairs)


GREEDY = Chooser(Sampling(), None, ())


def main() -> None:
    quiet_libraries()
    found: dict[str, Any] = {"versions": library_versions(), "training": {}, "decode": {}}
    for name, shape in SHAPES.items():
        for preset in ("reference", "recommended"):
            for held in ("bf16", "int8"):
                cost = training(shape, PRESETS[preset].lora, held)
                found["training"][f"{name}, {preset}, {held}"] = asdict(cost) | {"kept": round(cost.kept)}
        for adapters, slots in {"base": [0], "one adapter": [1], "four adapters": [1, 2, 3, 4]}.items():
            rows = [slots[row % len(slots)] for row in range(ROWS)]
            found["decode"][f"{name}, {ROWS} rows, {adapters}"] = asdict(decode(shape, rows, [GREEDY] * ROWS))
    print(json.dumps(found, indent=2))
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
