"""The state of one request in the engine: what it has generated, and which of its text has been sent."""

import time
from collections import Counter

import torch

from services.inference.engine.admission import Permit
from services.inference.engine.interface import (
    Alternative,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Sink,
    Started,
    Token,
)
from services.inference.engine.output import Output
from services.inference.engine.sampling import Choice, Chooser
from shared.datasets.tokens import Tokenizer
from shared.errors import TunesmithError


class SequenceState:
    """A submitted request.

    Attributes:
        prefilled: number of prompt tokens in the cache.
        output: generated ids; all but the last are in the cache.
        slot: of its adapter, set on admission; 0 for the base.
        cancelled: set from any thread, seen by the engine before its next step.
        ended: its last event has been sent.
    """

    def __init__(
        self, request: GenerationRequest, sink: Sink, permit: Permit, tokenizer: Tokenizer, device: torch.device
    ) -> None:
        self.request = request
        self.permit = permit
        self.prompt = list(request.prompt)
        self.output: list[int] = []
        self.prefilled = 0
        self.prompt_logprobs: list[float] = []
        self.prompt_alternatives: list[tuple[Alternative, ...]] = []
        self.slot = 0
        self.cancelled = self.ended = False
        self.submitted_at = time.monotonic()
        self.queue_seconds = 0.0
        self._sink = sink
        self._text = Output(request, tokenizer)
        self._generator: torch.Generator | None = None
        if request.sampling.do_sample:
            self._generator = torch.Generator(device).manual_seed(request.sampling.seed)
        penalised = request.sampling.repetition_penalty != 1
        self._constraint = request.grammar.begin() if request.grammar else None
        self._seen: set[int] | None = set(request.prompt) if penalised else None
        self._generated: Counter[int] | None = Counter() if request.sampling.counts_output else None

    @property
    def cached(self) -> int:
        """Positions of its row in the cache that are filled."""
        return self.prefilled + max(0, len(self.output) - 1)

    @property
    def reserved(self) -> int:
        return len(self.prompt) + self.request.max_new_tokens

    @property
    def chooser(self) -> Chooser:
        return Chooser(
            self.request.sampling,
            self._generator,
            self._seen or (),
            self.request.top_logprobs,
            self._generated,
            self._constraint,
        )

    @property
    def only_reads(self) -> bool:
        """Whether no token is asked for, only what the model thinks of the prompt."""
        return self.request.max_new_tokens == 0

    def start(self) -> Started:
        """What is told once the prompt is in the cache."""
        return Started(self.queue_seconds, tuple(self.prompt_logprobs), tuple(self.prompt_alternatives))

    def emit(self, event: Event) -> None:
        self._sink(event)

    def end(self, event: Event) -> None:
        """Send the last event, once."""
        if not self.ended:
            self.ended = True
            self.permit.release()
            self.emit(event)

    def fail(self, error: TunesmithError) -> None:
        self.end(Failed(error))

    def accept(self, choice: Choice, special_ids: frozenset[int]) -> None:
        """Take one chosen token: send the text that is safe to send, and end the sequence if the token is its last."""
        self.output.append(choice.id)
        if self._seen is not None:
            self._seen.add(choice.id)
        if self._generated is not None:
            self._generated[choice.id] += 1
        if self._constraint is not None:
            self._constraint.take(choice.id)
        complete = self._constraint is not None and self._constraint.complete
        text, reason = self._text.push(choice.id, last=complete)
        self.emit(Token(choice.id, text, choice.logprob, choice.id in special_ids, choice.alternatives, reason))
        if reason is not None:
            self.end(Finished(reason))
