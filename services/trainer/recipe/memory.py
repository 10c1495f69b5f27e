"""Whether a job fits into memory: what its largest micro-batch needs beside the loaded base, and what would fit.

What the forward pass keeps for its gradient is counted on a few tokens, in the model as it will train and whatever the
device is; it grows with the tokens of a micro-batch. Knows no session and no job store.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.trainer.data.layout import most_tokens
from services.trainer.model.forward import Packed, loss_sum, pack, training_forward
from services.trainer.model.fused import loss_rows
from services.trainer.model.llama import fused_form
from services.trainer.model.lora import Parameters
from services.trainer.model.precision import Precision
from services.trainer.recipe.rng import RandomState
from shared.jobs.spec import Hyperparameters
from shared.training.memory import FRAGMENTATION, OPTIMIZER_BYTES, logits_bytes

FreeMemory = Callable[[torch.device], int]
# Enough that what every token keeps outweighs what is kept once.
PROBE_TOKENS = 64
# On a GPU, a second count tells the two apart.
LONG_PROBE_TOKENS = 512
# The backward pass works on one layer at a time; measured, it takes up to four times what the layer kept.
LAYERS_AT_WORK = 4
# Lengths people can remember.
ROUND_LENGTH = 64
MIN_LENGTH = 8
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that training takes beside the loaded base.

    Attributes:
        fixed: whatever the micro-batches are.
        per_token: for every token of the largest micro-batch.
    """

    fixed: float
    per_token: float

    def of(self, tokens: int) -> float:
        return self.fixed + self.per_token * tokens

    def tokens_within(self, free: float) -> int:
        """The most tokens of a micro-batch that fit into `free` bytes; 0 if none do."""
        tokens = max(0, int((free - self.fixed) / self.per_token))
        # The division rounds.
        return tokens if tokens == 0 or self.of(tokens) <= free else tokens - 1


@dataclass(frozen=True, slots=True)
class Fit:
    """Numbers that would fit: those of the job, but for what has to be smaller."""

    max_length: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class Shortage:
    """A job that needs more memory than there is.

    Attributes:
        tokens: of its largest micro-batch.
        needed, free: bytes beside the loaded base.
        fit: None if not even the shortest rows would fit.
    """

    tokens: int
    needed: float
    free: int
    now: Fit
    fit: Fit | None

    @property
    def smaller(self) -> dict[str, int]:
        """The hyperparameters that have to be smaller, and what would fit."""
        if self.fit is None:
            return {}
        now = asdict(self.now)
        return {name: fit for name, fit in asdict(self.fit).items() if fit < now[name]}

    @property
    def advice(self) -> str:
        """What would fit, as the end of a sentence."""
        if self.fit is None:
            return "no max_length would fit; a base_precision of fewer bits or a smaller base might"
        now = asdict(self.now)
        smaller = (f"{name} {fit:,} (now {now[name]:,})" for name, fit in self.smaller.items())
        return " with ".join(smaller) + " would fit"


def shortage(
    need: Need, free: int, lengths: NDArray[np.int64], hyper: Hyperparameters, token_budget: int
) -> Shortage | None:
    """What a job lacks on rows of `lengths` tokens, int64 [rows]; None if it fits into `free` bytes."""
    now = Fit(hyper.max_length, hyper.batch_size)
    tokens = most_tokens(lengths, now.batch_size, token_budget)
    if need.of(tokens) <= free:
        return None
    fit = largest_fit(need.tokens_within(free), lengths, now, token_budget)
    return Shortage(tokens, need.of(tokens), free, now, fit)


def largest_fit(within: int, lengths: NDArray[np.int64], now: Fit, token_budget: int) -> Fit | None:
    """The longest rows whose micro-batches have at most `within` tokens, and the largest batch of such rows."""
    if within < MIN_LENGTH:
        return None
    length = now.max_length
    if lengths.max() > within:
        # Only then does a row have to be cut; else fewer of them at a time are enough.
        length = within if within < 2 * ROUND_LENGTH else within // ROUND_LENGTH * ROUND_LENGTH
    cut = np.minimum(lengths, length)
    batches = range(1, now.batch_size + 1)
    fitting = bisect_right(batches, within, key=lambda batch: most_tokens(cut, batch, token_budget))
    return Fit(length, max(1, fitting))


def fitting_budget(need: Need, free: int, lengths: NDArray[np.int64], token_budget: int) -> int:
    """Most tokens of a micro-batch that fits into `free` bytes, up to `token_budget`; a whole row at least."""
    return max(int(lengths.max()), min(token_budget, need.tokens_within(free)))


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still have on a device: of the machine and of its container, or of the GPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch's allocator holds and nobody uses is ours already.
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(psutil.virtual_memory().available, cgroup_bytes(CGROUP))


def cgroup_bytes(group: Path) -> int:
    """What is left of a control group's memory (cgroup v2), file cache counted as free; without a limit, very much."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(limit) - int(used) + int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):
        # No such group, or "max".
        return 1 << 62


def measure_need(
    model: Any, parameters: Parameters, ids: NDArray[np.int64], share: float, precision: Precision
) -> Need:
    """What training `parameters` of a model needs, counted by a forward pass over `ids`, int64 [tokens].

    Args:
        share: of the tokens, how many are supervised.

    The process's random state is left as it was.
    """
    random = RandomState.capture(precision.device)
    with training_forward(model, dropout=True):
        each, once = _kept_by_tokens(model, ids, share, precision)
    random.restore(precision.device)
    vocabulary = model.config.vocab_size
    # The weights themselves are there already.
    fixed = once + OPTIMIZER_BYTES * sum(parameter.numel() for parameter in parameters.values())
    per_token = each * (FRAGMENTATION + LAYERS_AT_WORK / model.config.num_hidden_layers)
    with precision.autocast():
        in_blocks = fused_form(model) is not None
    if in_blocks:
        return Need(fixed + logits_bytes(vocabulary, loss_rows(precision.device)), per_token)
    return Need(fixed, per_token + logits_bytes(vocabulary, share))


def _kept_by_tokens(model: Any, ids: NDArray[np.int64], share: float, precision: Precision) -> tuple[float, float]:
    """Bytes kept for each token, and once: on a GPU, autocast keeps half-precision copies of fp32 weights."""

    def kept(tokens: int) -> int:
        probe = np.resize(ids, tokens)
        supervised = np.arange(tokens) >= tokens - max(1, round(share * (tokens - 1)))
        return kept_bytes(model, pack([(probe, supervised)], precision.device), precision)

    few = kept(PROBE_TOKENS)
    if precision.device.type == "cpu":
        return few / PROBE_TOKENS, 0.0
    many = kept(LONG_PROBE_TOKENS)
    each = (many - few) / (LONG_PROBE_TOKENS - PROBE_TOKENS)
    return each, max(0.0, few - each * PROBE_TOKENS)


def kept_bytes(model: Any, packed: Packed, precision: Precision) -> int:
    """Bytes that the forward pass of a pack keeps for its gradient: without weights, and shared memory once."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        # While the graph lives, no tensor takes the address of one that it keeps.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), precision.autocast():
        loss = loss_sum(model, packed)
    for tensor in _held_elsewhere(loss):
        note(tensor)
    return sum(kept.values())


def _held_elsewhere(loss: Tensor) -> Iterator[Tensor]:
    """Tensors that a graph's functions hold as attributes of their own: bitsandbytes' do."""
    seen: set[Any] = set()
    functions: list[Any] = [loss.grad_fn]
    while functions:
        function = functions.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        for value in getattr(function, "__dict__", {}).values():
            values = value if isinstance(value, list | tuple) else [value]
            yield from (tensor for tensor in values if isinstance(tensor, Tensor))
        functions += [following for following, _ in function.next_functions]
