"""The text of what one sequence generates: what of it can be sent, and whether the sequence has ended.

The same for every engine: whatever computes the tokens, clients get the same text of them.
"""

from services.inference.engine.interface import FinishReason, GenerationRequest
from services.inference.engine.text import Detokenizer, StopFinder
from shared.datasets.tokens import Tokenizer


class Output:
    """The output of one request."""

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer) -> None:
        self._left = request.max_new_tokens
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopFinder(request.stop, keep=request.keep_stop, ends=() if request.ignore_eos else request.ends)
        self._asked = frozenset(request.stop)
        self._stop_ids = frozenset() if request.ignore_eos else tokenizer.stop_ids

    def push(self, token: int, *, last: bool = False) -> tuple[str, FinishReason | None]:
        """Take one token.

        Args:
            last: nothing may follow it, whatever it is.

        Returns:
            Text that is safe to send after it: whole characters, nothing that may still become a stop string. And why
            the sequence ends here; None if it goes on.
        """
        self._left -= 1
        ends = token in self._stop_ids
        text = "" if ends else self._stops.push(self._detokenizer.push(token))
        reason = self._reason(ends or last)
        if reason in ("length", "eos_token"):
            text += self._stops.push(self._detokenizer.flush())
            reason = self._stopped() or reason
            text += self._stops.flush()
        return text, reason

    def _reason(self, ends: bool) -> FinishReason | None:
        if self._stops.found or ends:
            return self._stopped() or "eos_token"
        return None if self._left > 0 else "length"

    def _stopped(self) -> FinishReason | None:
        """Why the text ends with a stop string: one that the client asked for, or the prompt format's own end."""
        found = self._stops.found
        return None if found is None else "stop_sequence" if found in self._asked else "eos_token"
