"""Text of a growing sequence: whole characters only, and an end at the first stop string.

Knows no tensors and no requests.
"""

from collections.abc import Iterable

from shared.datasets.tokens import Tokenizer

_UNFINISHED = "\ufffd"


class Detokenizer:
    """Turns ids into text piece by piece, never letting out half a character.

    Decodes a short window twice (with and without the new ids), so that the cost does not grow with the text; the way
    of text-generation-inference's `decode_token`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._said = 0
        """How many ids of the window have been let out already."""

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._window.append(token)
        return self._take(last=False)

    def flush(self) -> str:
        """What is left at the end; half characters come out as U+FFFD."""
        return self._take(last=True)

    def _take(self, *, last: bool) -> str:
        before = self._tokenizer.decode(self._window[: self._said])
        after = self._tokenizer.decode(self._window)
        if len(after) <= len(before) or (after.endswith(_UNFINISHED) and not last):
            return ""
        # The ids just let out stay as context: some decoders treat the first id of a text differently.
        self._window = self._window[self._said :]
        self._said = len(self._window)
        return after[len(before) :]


class StopFinder:
    """Lets text through up to the first stop string, and holds back what may become one.

    Args:
        stops: none of them empty.
        keep: whether the stop string itself is let through.
    """

    def __init__(self, stops: Iterable[str], *, keep: bool) -> None:
        self._stops = tuple(stops)
        self._keep = keep
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Text that is safe to let out after `piece`; sets `found` when a stop string is complete."""
        if not self._stops:
            return piece
        text = self._held + piece
        end = self._first_end(text)
        if end is not None:
            self.found, self._held = True, ""
            return text[: end[1] if self._keep else end[0]]
        split = len(text) - self._open_length(text)
        self._held = text[split:]
        return text[:split]

    def flush(self) -> str:
        """What was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _first_end(self, text: str) -> tuple[int, int] | None:
        """(start, end) of the stop string that is complete first; the longest of those that end together."""
        places = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if not places:
            return None
        end, start = min(places)
        return start, end

    def _open_length(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
