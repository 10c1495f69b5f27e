"""The micro-batches of each optimizer step as tensors; for a GPU, the next step's are made while it computes.

What a step's micro-batches are depends on its number and the token budget alone, so that those made ahead are those
that would have been made at the step. Draws no random number.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import torch

from services.trainer.data.dataset import Rows
from services.trainer.data.layout import Layout, MicroBatch, pack_rows
from services.trainer.model.forward import HostPack, Packed, pack, pack_on_host


@dataclass(frozen=True, slots=True)
class _Ahead:
    """What a thread makes of one step."""

    step: int
    token_budget: int
    packs: "Future[list[HostPack]]"


class Batches:
    """Use as a context manager around the steps: leaving it ends the thread.

    Args:
        ahead: whether a thread makes the next step's; None does that for GPUs alone: a CPU's step would have to share
            its cores.
    """

    def __init__(self, rows: Rows, layout: Layout, device: torch.device, *, ahead: bool | None = None) -> None:
        self._rows = rows
        self._layout = layout
        self._device = device
        self._is_ahead = device.type == "cuda" if ahead is None else ahead
        self._thread: ThreadPoolExecutor | None = None
        self._next: _Ahead | None = None

    def __enter__(self) -> Self:
        if self._is_ahead:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        return self

    def __exit__(self, *_: object) -> None:
        thread, self._thread, self._next = self._thread, None, None
        if thread is not None:
            thread.shutdown(cancel_futures=True)

    def take(self, step: int, token_budget: int) -> list[Packed]:
        """The micro-batches of 0-based `step`, of at most `token_budget` tokens, on the device.

        Raises:
            Exception: what reading the rows raised, at the step that needs them.
        """
        if self._thread is None:
            return [pack([self._rows[row] for row in batch], self._device) for batch in self._of(step, token_budget)]
        made, self._next = self._next, None
        if made is not None and (made.step, made.token_budget) == (step, token_budget):
            packs = made.packs.result()
        else:
            # The first step, or one that is done again with less memory.
            packs = self._thread.submit(self._read, self._of(step, token_budget)).result()
        if step + 1 < self._layout.total_steps:
            # The layout keeps one epoch's order, and is asked by this thread alone.
            following = self._of(step + 1, token_budget)
            self._next = _Ahead(step + 1, token_budget, self._thread.submit(self._read, following))
        return [packed.to(self._device) for packed in packs]

    def _of(self, step: int, token_budget: int) -> list[MicroBatch]:
        return pack_rows(self._layout.rows(step), self._layout.lengths, token_budget)

    def _read(self, batches: Sequence[MicroBatch]) -> list[HostPack]:
        pinned = self._device.type == "cuda"
        return [pack_on_host([self._rows[row] for row in batch], pinned=pinned) for batch in batches]
