"""Which sequence computes what in the next forward pass, and in which row of the cache it lies.

Decoding sequences lie in the rows at the front of the cache, and the prompts being prefilled right behind them; when
one leaves, the last row moves into its place. Nothing is evicted: a sequence is admitted only when a row is free, and
a row holds its prompt and all its new tokens. Used by one thread only. Knows no models and no text.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.inference.engine.runner import Piece, RowCache
from services.inference.engine.sequence import SequenceState
from shared.errors import TunesmithError


@dataclass(frozen=True, slots=True)
class PromptPass:
    """Prompts, whole or in part, that one forward pass puts into the cache; a part of a prompt always comes alone.

    Attributes:
        pieces: what each of `sequences` computes, in the same order.
    """

    sequences: Sequence[SequenceState]
    pieces: Sequence[Piece]

    @property
    def tokens(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces)


class Scheduler:
    """Admits, orders and places the sequences of one engine.

    Args:
        cache: moved and cleared along with the rows.
        rows: sequences in flight at most.
        context: capacity of a row.
        slots: uid of every loaded adapter → its slot, as it is when a sequence is admitted.

    Attributes:
        running: decoding sequences; their index is their row.
        prefilling: those whose prompts are being put into the rows behind.
    """

    def __init__(self, cache: RowCache, *, rows: int, context: int, slots: Mapping[str, int]) -> None:
        self._cache = cache
        self._rows, self._context, self._slots = rows, context, slots
        self._waiting: deque[SequenceState] = deque()
        self.running: list[SequenceState] = []
        self.prefilling: list[SequenceState] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self.running or self.prefilling)

    def add(self, sequence: SequenceState) -> None:
        """Queue behind all others."""
        self._waiting.append(sequence)

    def next_prompts(self, budget: int) -> PromptPass | None:
        """What to prefill next with at most `budget` tokens: the oldest first, whole prompts together.

        A prompt longer than the budget is computed in pieces, in one pass each. None if there is nothing to prefill.
        """
        if budget <= 0:
            return None
        if not self.prefilling:
            self._admit_whole_prompts(budget)
        if not self.prefilling:
            self._admit(None)
        if not self.prefilling:
            return None
        first = self.prefilling[0]
        # Log probabilities need the logits of the whole prompt, which only a pass of its own gives.
        alone = first.prefilled or len(first.prompt) > budget or any(s.request.prompt_logprobs for s in self.prefilling)
        return self._pass([first] if alone else list(self.prefilling), budget)

    def alone(self, sequence: SequenceState) -> PromptPass:
        """The whole prompt of one that is being prefilled, first in its row, the others not begun."""
        self.prefilling.remove(sequence)
        self.prefilling.insert(0, sequence)
        return self._pass([sequence], len(sequence.prompt))

    def prefilled(self, prompts: PromptPass) -> list[SequenceState]:
        """Note that a pass was computed; returns the sequences that decode from now on."""
        for sequence, piece in zip(prompts.sequences, prompts.pieces, strict=True):
            sequence.prefilled += len(piece.ids)
        begun = [each for each in prompts.sequences if each.prefilled == len(each.prompt)]
        for sequence in begun:
            self.prefilling.remove(sequence)
            self.running.append(sequence)
        return begun

    def failed(self, prompts: PromptPass) -> None:
        """Clear what a pass that failed may have written; its sequences are prefilling as before."""
        for piece in prompts.pieces:
            self._cache.clear(piece.row, min(piece.start + len(piece.ids), self._context))

    def remove(self, sequence: SequenceState) -> None:
        """Take a sequence out, wherever it is, and close the gap in the rows; no error if it is nowhere."""
        if sequence in self.running:
            self._remove_running(sequence)
        elif sequence in self.prefilling:
            # Only the first has anything in the cache; the rows behind it are empty.
            self._cache.clear(len(self.running), sequence.prefilled)
            self.prefilling.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def cancelled(self) -> list[SequenceState]:
        """Those that were cancelled, waiting or in flight."""
        return [each for each in (*self._waiting, *self.prefilling, *self.running) if each.cancelled]

    def in_flight(self) -> list[SequenceState]:
        return [*self.running, *self.prefilling]

    def clear(self) -> list[SequenceState]:
        """Take out all that are in flight and zero their rows; returns them."""
        gone = self.in_flight()
        self.running, self.prefilling = [], []
        for row in range(len(gone)):
            self._cache.clear(row, self._context)
        return gone

    def drain(self) -> list[SequenceState]:
        """Take out everything, without touching the cache."""
        gone = [*self._waiting, *self.in_flight()]
        self._waiting.clear()
        self.running, self.prefilling = [], []
        return gone

    def _admit_whole_prompts(self, budget: int) -> None:
        """As many prompts as fit `budget` as a whole; one with log probabilities needs a pass of its own."""
        while (sequence := self._admit(budget)) is not None:
            budget -= len(sequence.prompt)
            if sequence.request.prompt_logprobs:
                break

    def _admit(self, most_tokens: int | None) -> SequenceState | None:
        """The oldest waiting one, if a row is free for it and its prompt has no more than `most_tokens`."""
        while self._waiting and len(self.running) + len(self.prefilling) < self._rows:
            if most_tokens is not None and len(self._waiting[0].prompt) > most_tokens:
                return None
            sequence = self._waiting.popleft()
            sequence.permit.release()
            sequence.queue_seconds = time.monotonic() - sequence.submitted_at
            adapter = sequence.request.adapter
            if adapter is None or adapter in self._slots:
                sequence.slot = 0 if adapter is None else self._slots[adapter]
                self.prefilling.append(sequence)
                return sequence
            sequence.fail(TunesmithError("the adapter was unloaded before the request ran", code="adapter_gone"))
        return None

    def _pass(self, sequences: list[SequenceState], budget: int) -> PromptPass:
        pieces = [
            Piece(row, each.prompt[each.prefilled : each.prefilled + budget], each.prefilled, each.slot)
            for row, each in enumerate(sequences, len(self.running))
        ]
        return PromptPass(sequences, pieces)

    def _remove_running(self, sequence: SequenceState) -> None:
        row, last = self.running.index(sequence), len(self.running) - 1
        # `cached` does not count the token that a failing step has written already.
        self._cache.clear(row, min(sequence.cached + 1, self._context))
        if row != last:
            self._cache.move(last, row, self.running[last].cached)
            self.running[row] = self.running[last]
        self.running.pop()
        for behind, each in enumerate(self.prefilling, last):
            if each.prefilled:
                self._cache.move(behind + 1, behind, each.prefilled)
