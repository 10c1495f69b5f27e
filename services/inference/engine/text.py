"""Text of a growing sequence: whole characters only, cut at the first stop string. Knows no tensors and no requests."""

from collections.abc import Iterable

from tokenizers.decoders import DecodeStream

from shared.datasets.tokens import Tokenizer


class Detokenizer:
    """Turns ids into text piece by piece and never emits half a character.

    `tokenizers` does the work, in a window whose cost does not grow with the text. Left to do here is what it has no
    answer for: half a character at the end, and bytes that are no UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._pending.append(token)
        try:
            piece = self._stream.step(self._tokenizer.fast, token)
        except Exception:  # tokenizers raises bare Exception
            # Byte fallback turns a whole run of bytes into U+FFFD once one of them is wrong, also those that have been
            # emitted as characters; the stream does not go on from there.
            self._stream = DecodeStream([token], skip_special_tokens=self._skip)
            return self.flush()
        if piece:
            self._pending.clear()
        return piece or ""

    def flush(self) -> str:
        """What is pending at the end; half characters come out as U+FFFD."""
        pending, self._pending = self._pending, []
        return self._tokenizer.decode(pending, skip_special_tokens=self._skip)


class StopFinder:
    """Passes text on up to the first stop string, and holds back what may become one.

    Args:
        stops: none of them empty.
        keep: whether the stop string itself is passed on.
        ends: stop strings that nobody asked for: they are never passed on.

    Attributes:
        found: the stop string that is complete.
    """

    def __init__(self, stops: Iterable[str], *, keep: bool, ends: Iterable[str] = ()) -> None:
        asked = tuple(stops)
        self._kept = asked if keep else ()
        self._stops = (*asked, *ends)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Text that is safe to send after `piece`; sets `found` when a stop string is complete."""
        if not self._stops:
            return piece
        text = self._held + piece
        end = self._first_end(text)
        if end is not None:
            start, after = end
            self.found, self._held = text[start:after], ""
            return text[: after if self.found in self._kept else start]
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
