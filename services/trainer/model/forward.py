"""Packed samples through the model to one loss: the training forward, which evaluation uses too.

Samples are packed into one row; `position_ids` restart with each. Without an attention mask and a cache, transformers
then keeps samples apart by a block-diagonal mask (masking_utils.py of 5.23). Logits are computed only where a token is
supervised.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from services.trainer.model.attention import attends_per_sample
from services.trainer.model.llama import fused_form

Sample = tuple[NDArray[np.int64], NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class Packed:
    """Samples packed for one forward pass.

    Attributes:
        ids, positions: int64 [1, tokens].
        lengths: tokens of each sample.
        predictors: int64 [supervised], index of the token before each supervised one.
        labels: int64 [supervised], the supervised tokens.
    """

    ids: Tensor
    positions: Tensor
    lengths: list[int]
    predictors: Tensor
    labels: Tensor

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]


@dataclass(frozen=True, slots=True)
class HostPack:
    """A pack in the host's memory.

    Attributes:
        numbers: int64 [2 x tokens + 2 x supervised]: ids, positions, predictors and labels, one behind the other.
        lengths: tokens of each sample.
    """

    numbers: Tensor
    lengths: list[int]

    def to(self, device: torch.device) -> Packed:
        """The pack on a device, by one copy; from pinned memory nothing waits for it."""
        numbers = self.numbers.to(device, non_blocking=True)
        tokens = sum(self.lengths)
        supervised = len(numbers) // 2 - tokens
        ids, positions, predictors, labels = numbers.split_with_sizes([tokens, tokens, supervised, supervised])
        return Packed(ids[None], positions[None], self.lengths, predictors, labels)


def pack(samples: Sequence[Sample], device: torch.device) -> Packed:
    """Pack samples one behind the other.

    No sample's first token may be supervised: no token of the sample predicts it.
    """
    parts, lengths = _parts(samples)
    ids, positions, predictors, labels = (torch.as_tensor(values, device=device) for values in parts)
    return Packed(ids[None], positions[None], lengths, predictors, labels)


def pack_on_host(samples: Sequence[Sample], *, pinned: bool) -> HostPack:
    """The same in the host's memory.

    Args:
        pinned: in memory that a GPU reads by itself; there must be one.
    """
    parts, lengths = _parts(samples)
    numbers = torch.empty(sum(map(len, parts)), dtype=torch.int64, pin_memory=pinned)
    np.concatenate(parts, out=numbers.numpy())
    return HostPack(numbers, lengths)


def _parts(samples: Sequence[Sample]) -> tuple[list[NDArray[np.int64]], list[int]]:
    """([ids, positions, predictors, labels], tokens of each sample)."""
    ids = np.concatenate([ids for ids, _ in samples])
    supervised = np.concatenate([flags for _, flags in samples])
    lengths = [len(ids) for ids, _ in samples]
    positions = np.concatenate([np.arange(length) for length in lengths])
    (indices,) = np.nonzero(supervised)
    assert not (positions[indices] == 0).any()
    return [ids, positions, indices - 1, ids[indices]], lengths


def supervised_logits(model: Any, packed: Packed) -> Tensor:
    """Logits [supervised, vocabulary], fp32 or wider, for the supervised tokens of a pack, in order."""
    fused = fused_form(model)
    if fused is not None:
        return fused.logits(packed.ids[0], packed.positions[0], packed.lengths, packed.predictors)
    extra = {"sample_lengths": packed.lengths} if attends_per_sample(model) else {}
    output = model(
        input_ids=packed.ids,
        position_ids=packed.positions,
        use_cache=False,
        logits_to_keep=packed.predictors,
        **extra,
    )
    logits: Tensor = output.logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def loss_sum(model: Any, packed: Packed) -> Tensor:
    """Cross-entropy summed over the supervised tokens of a pack, in nats: a scalar, fp32 or wider."""
    fused = fused_form(model)
    if fused is not None:
        return fused.loss(packed.ids[0], packed.positions[0], packed.lengths, packed.predictors, packed.labels)
    return functional.cross_entropy(supervised_logits(model, packed), packed.labels, reduction="sum")


@contextmanager
def training_forward(model: nn.Module, *, dropout: bool) -> Iterator[None]:
    """The forward pass as training computes it, with dropout on or off; eval mode again afterwards.

    On a CPU, bitsandbytes' layers compute another function in eval mode (activations rounded to int8 as well: loss
    3.223 against 3.203 on SmolLM2-135M), so they are kept in train mode throughout; they have no dropout of their own.
    """
    model.train(dropout)
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes."):
            module.train()
    try:
        yield
    finally:
        model.eval()
