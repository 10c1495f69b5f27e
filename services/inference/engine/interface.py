"""What an engine is: `submit / cancel / load / unload / stats`. Pure data and a protocol, no torch.

The HTTP side and the adapter registry import nothing else of the engine, so that another backend can replace it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from services.inference.engine.admission import Permit
from shared.errors import TunesmithError

FinishReason = Literal["length", "eos_token", "stop_sequence"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; greedy unless `do_sample`.

    They act in this order, transformers' where it has them: repetition penalty; frequency and presence penalty and
    bias, summed; temperature, top_k, top_p, min_p, typical_p. What follows the temperature is for sampled rows only.

    Attributes:
        top_p, min_p, typical_p: None, or 1, 0 and 1 in turn, rule out nothing.
        repetition_penalty: divides positive scores of tokens in prompt and output, and multiplies negative ones.
        frequency_penalty: taken from a token's score as often as it has been generated; OpenAI's.
        presence_penalty: taken once from the score of a token that has been generated; OpenAI's.
        logit_bias: (token id, what is added to its score), each id once.
        seed: of this request's own generator; the same seed and prompt give the same text in any batch.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    min_p: float | None = None
    typical_p: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def counts_output(self) -> bool:
        """Whether it matters how often a token has been generated."""
        return bool(self.frequency_penalty or self.presence_penalty)

    @property
    def plain(self) -> bool:
        """Whether it is the largest score that wins, as the model gave it."""
        return not (self.do_sample or self.repetition_penalty != 1 or self.counts_output or self.logit_bias)


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class GrammarText:
    """What generated text must follow, as a client writes it.

    Attributes:
        source: a JSON schema as JSON, a regular expression, or llguidance's notation (of this server's making). What is
            lenient of a schema are keywords that cannot be followed: they are passed over.
    """

    kind: Literal["json_schema", "lenient_json_schema", "regex", "lark"]
    source: str


class Constraint(Protocol):
    """How far one sequence has got in its grammar. Both methods raise InvalidRequest if the grammar fails."""

    def allowed(self) -> Any:
        """Which tokens may come next: a numpy array, bool [vocabulary]."""
        ...

    def take(self, token: int) -> None:
        """Go on by a token that was allowed."""
        ...

    @property
    def complete(self) -> bool:
        """Whether nothing can follow any more."""
        ...


class CompiledGrammar(Protocol):
    """A grammar ready for use by any number of sequences."""

    @property
    def text(self) -> GrammarText:
        """What it was compiled from, for engines that follow grammars by themselves: a schema as JSON, a regular
        expression, or llguidance's notation."""
        ...

    def begin(self) -> Constraint:
        """A state at the beginning of a text."""
        ...


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to continue.

    Attributes:
        prompt: token ids, at least one.
        adapter: a uid given to `Engine.load`, or None for the base.
        stop: the text ends with the first of these that appears, also across token borders.
        keep_stop: whether the stop string stays in the text (TGI) or is cut off (OpenAI).
        ends: where the prompt's format begins another turn: the text ends before it, as if by the end-of-text token.
        top_logprobs: how many alternatives to report for each token.
        max_new_tokens: 0 only reads the prompt.
        prompt_logprobs: report the log probability of each prompt token.
        prompt_top_logprobs: and so many alternatives to each.
        grammar: what the text must follow; it ends when the grammar does.
        cache_scope: requests of the same scope may share what was computed of their prompts.
    """

    prompt: Sequence[int]
    adapter: str | None = None
    max_new_tokens: int = 100
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    keep_stop: bool = True
    ends: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    prompt_top_logprobs: int = 0
    grammar: CompiledGrammar | None = None
    cache_scope: str = ""


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have been chosen. `logprob` is natural, of the model's own distribution."""

    id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Started:
    """The request has left the queue and its prompt is in the cache.

    Attributes:
        prompt_logprobs: for each prompt token but the first; empty unless asked for.
        prompt_alternatives: likewise, the likeliest first.
        queue_seconds: time between `submit` and leaving the queue.
    """

    queue_seconds: float
    prompt_logprobs: tuple[float, ...] = ()
    prompt_alternatives: tuple[tuple[Alternative, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    Attributes:
        text: what can be sent after this token: whole characters only, nothing that may still become a stop string.
            Empty for special tokens. All tokens' texts joined are the generated text.
        logprob: natural log probability under the model's own distribution, before temperature and penalties.
        finish: set on the last token.
    """

    id: int
    text: str
    logprob: float
    special: bool
    alternatives: tuple[Alternative, ...] = ()
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Failed:
    error: TunesmithError


@dataclass(frozen=True, slots=True)
class Cancelled:
    pass


Event = Started | Token | Finished | Failed | Cancelled
"""Every request submitted gets exactly one last event: Finished, Failed or Cancelled."""

Sink = Callable[[Event], None]
"""Called on the engine's thread; must return at once and not raise."""


@dataclass(frozen=True, slots=True)
class Stats:
    """The engine's state at one moment.

    Attributes:
        running: sequences that hold a slot.
        waiting: sequences queued, with `waiting_tokens` prompt tokens.
        batch_tokens: prompt and new tokens reserved by the running sequences.
        last_token_at: `time.monotonic()` of the newest token; 0 before the first.
    """

    running: int
    waiting: int
    waiting_tokens: int
    batch_tokens: int
    adapters: int
    steps: int
    tokens: int
    last_token_at: float


class AdapterWeights(Protocol):
    """Weights of one adapter, checked and ready to load. What is in them, only the engine knows."""

    @property
    def rank(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes the adapter takes in the engine."""
        ...


class Engine(Protocol):
    """Generates tokens for many requests at once; callable from any thread."""

    @property
    def context(self) -> int:
        """Most tokens (prompt and new) that one sequence can have."""
        ...

    def submit(self, request: GenerationRequest, sink: Sink, permit: Permit | None = None) -> Any:
        """Queue a request; its events go to `sink`.

        Args:
            permit: the request's, of the engine's `Admission`, if the caller has acquired one; acquired here if not.

        Returns:
            A handle for `cancel`.

        Raises:
            Overloaded: the queue is full.
            InvalidRequest: the sequence would not fit the context.
            Unavailable: the engine has been closed.
        """
        ...

    def cancel(self, handle: Any) -> None:
        """Abort a request; its slot is free within one step. No error if it has ended already."""
        ...

    def load(self, uid: str, weights: Any) -> "Future[None]":
        """Put an adapter into a slot between two steps. The caller never loads more than `adapter_slots`."""
        ...

    def unload(self, uid: str) -> "Future[None]":
        """Free an adapter's slot. The caller ensures that no request uses the adapter any more."""
        ...

    def stats(self) -> Stats: ...

    def close(self) -> None:
        """Fail what is left and end the thread."""
        ...
