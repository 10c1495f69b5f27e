"""Which requests are admitted: sequences that fit the context, and only so many requests and prompt tokens at once.

A full queue refuses at once instead of growing.
"""

import threading
from collections.abc import Sequence

from shared.errors import InvalidRequest, Overloaded


class Permit:
    """One request's permission to wait in the queue; released exactly once."""

    def __init__(self, admission: "Admission", tokens: int) -> None:
        self._admission: Admission | None = admission
        self.tokens = tokens

    def resize(self, tokens: int) -> None:
        """Count the prompt's real length instead of the estimate that it was acquired with.

        Raises:
            Overloaded: the prompt is longer and does not fit beside the others; the permit is still held.
        """
        if self._admission is not None:
            self._admission._resized(self.tokens, tokens)
            self.tokens = tokens

    def release(self) -> None:
        """Give the permit back; a second call does nothing."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission._released(self.tokens)


class Admission:
    """Counts requests between their acceptance and their slot, over all threads.

    A request that waits for its adapter counts too: it holds its prompt as one in the engine's queue does.
    """

    def __init__(self, *, requests: int, tokens: int) -> None:
        self._most_requests, self._most_tokens = requests, tokens
        self._lock = threading.Lock()
        self.requests = 0
        self.tokens = 0

    def acquire(self, tokens: int) -> Permit:
        """A permit for a prompt of so many tokens.

        Raises:
            Overloaded: the queue is full. An empty queue takes any prompt.
        """
        return self.acquire_all([tokens])[0]

    def acquire_all(self, tokens: Sequence[int]) -> list[Permit]:
        """Permits for sequences of one request, prompts of so many tokens: for all of them, or for none.

        Raises:
            Overloaded: the queue is full. An empty queue takes any request.
        """
        with self._lock:
            requests, total = self.requests + len(tokens), self.tokens + sum(tokens)
            if self.requests and (requests > self._most_requests or total > self._most_tokens):
                raise self._overloaded()
            self.requests, self.tokens = requests, total
        return [Permit(self, each) for each in tokens]

    def _resized(self, before: int, after: int) -> None:
        with self._lock:
            others = self.tokens - before
            if after > before and others and others + after > self._most_tokens:
                raise self._overloaded()
            self.tokens = others + after

    def _overloaded(self) -> Overloaded:
        return Overloaded(f"the queue is full ({self.requests} requests, {self.tokens} prompt tokens); try again later")

    def _released(self, tokens: int) -> None:
        with self._lock:
            self.requests -= 1
            self.tokens -= tokens


def check_length(prompt_tokens: int, max_new_tokens: int, context: int) -> None:
    """Raise InvalidRequest, naming the field, if such a sequence does not fit the context."""
    if prompt_tokens == 0:
        raise InvalidRequest("the prompt has no tokens", param="inputs")
    if prompt_tokens + min(1, max_new_tokens) > context:
        raise prompt_too_long(str(prompt_tokens), context)
    if prompt_tokens + max_new_tokens > context:
        raise InvalidRequest(
            f"the maximum context length is {context} tokens, but {prompt_tokens + max_new_tokens} are asked for: "
            f"{prompt_tokens} in the prompt and {max_new_tokens} new ones",
            param="max_new_tokens",
            code="context_length_exceeded",
        )


def prompt_too_long(prompt_tokens: str, context: int) -> InvalidRequest:
    """What is raised of a prompt with so many tokens; clients look for OpenAI's code and for its words."""
    return InvalidRequest(
        f"the maximum context length is {context} tokens, one of them new, but the prompt has {prompt_tokens} tokens",
        param="inputs",
        code="context_length_exceeded",
    )
