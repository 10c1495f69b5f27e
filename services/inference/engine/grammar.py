"""Grammars that generated text must follow: JSON schemas and regular expressions, compiled once and kept.

The library is llguidance, which says for each step which tokens may come next. Compiling happens on threads of its own,
never on the engine's, after a process that can be ended has shown that it takes seconds at most. Knows tokenizers, but
no requests and no tensors.
"""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

from services.inference.engine import check_grammar
from services.inference.engine.interface import GrammarText
from services.inference.engine.json_schema import for_grammar
from shared.datasets.tokens import Tokenizer
from shared.errors import InvalidRequest, Unavailable

MOST_BYTES = 65_536
MOST_DEPTH = 48
CHECK_SECONDS = 60.0
_KEPT = 64


class Grammar:
    """A compiled grammar; any number of sequences may follow it.

    Attributes:
        text: what it was compiled from; of a schema only what can be followed.
    """

    def __init__(self, text: GrammarText, matcher: LLMatcher, vocabulary: int) -> None:
        self.text = text
        self._matcher, self._vocabulary = matcher, vocabulary

    def begin(self) -> "GrammarState":
        """A state at the beginning of a text."""
        return GrammarState(self._matcher.deep_copy(), self._vocabulary)


class GrammarState:
    """How far one sequence has got in its grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._bits = np.zeros((vocabulary + 31) // 32, np.int32)

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens may come next: bool [vocabulary]; the end token is one where the text may end.

        Raises:
            InvalidRequest: code `invalid_grammar`; the grammar is too costly for one step.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        return bits[: self._vocabulary].view(np.bool_)

    def take(self, token: int) -> None:
        """Go on by a token that was allowed.

        Raises:
            InvalidRequest: code `invalid_grammar`.
        """
        self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Whether nothing can follow any more."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refused(f"failed while text was generated: {_brief(self._matcher.get_error())}")


class Grammars:
    """Compiles grammars for one base, and keeps those used last, also those that were refused.

    Args:
        vocabulary: how many scores the model gives, padding included.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._own: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._kept: OrderedDict[GrammarText, asyncio.Future[Grammar]] = OrderedDict()
        self._pool = ThreadPoolExecutor(2, "grammar")

    async def compiled(self, text: GrammarText) -> Grammar:
        """The grammar of a text; compiled by whoever asks first.

        Raises:
            InvalidRequest: code `invalid_grammar`; it cannot be compiled within the limits.
            Unavailable: no process could be started to find that out.
        """
        if text not in self._kept:
            if len(text.source.encode()) > MOST_BYTES:
                raise _refused(f"has more than {MOST_BYTES} bytes")
            loop = asyncio.get_running_loop()
            self._kept[text] = loop.run_in_executor(self._pool, self._compile, text)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(text)
        future = self._kept[text]
        try:
            # Whoever leaves must not end it for the others.
            return await asyncio.shield(future)
        except InvalidRequest:
            raise
        except Exception:
            # The machine's fault, not the grammar's: the next one tries again.
            if self._kept.get(text) is future:
                del self._kept[text]
            raise

    def close(self) -> None:
        """Compile nothing any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, text: GrammarText) -> Grammar:
        followed = _followed(text)
        _check_cost(_serialised(followed))
        return self._grammar(followed)

    def _grammar(self, followed: GrammarText) -> Grammar:
        return Grammar(followed, self._matcher(_serialised(followed)), self._vocabulary)

    def _matcher(self, source: str) -> LLMatcher:
        matcher = LLMatcher(self._own_tokenizer(), source, log_level=0, limits=check_grammar.limits())
        if matcher.is_error():
            raise _refused(f"cannot be compiled: {_brief(matcher.get_error())}")
        return matcher

    def _own_tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._own is None:
                ends = sorted(self._tokenizer.stop_ids)
                self._own = LLTokenizer(self._tokenizer.fast.to_str(), n_vocab=self._vocabulary, eos_token=ends)
            return self._own


def _serialised(text: GrammarText) -> str:
    """What is followed, as the library takes it."""
    if text.kind == "lark":
        return str(LLMatcher.grammar_from_lark(text.source))
    if text.kind == "regex":
        return str(LLMatcher.grammar_from_regex(text.source))
    return str(LLMatcher.grammar_from_json_schema(text.source))


def _followed(text: GrammarText) -> GrammarText:
    """What of a grammar is followed: of a schema, what the library understands as clients mean it.

    Raises:
        InvalidRequest: a schema that is no JSON object, or too deep.
    """
    if text.kind in ("lark", "regex"):
        return text
    try:
        schema = json.loads(text.source)
    except (ValueError, RecursionError):
        raise _refused("is no JSON") from None
    if not isinstance(schema, dict):
        raise _refused("must be a JSON object")
    if _depth(schema) > MOST_DEPTH:
        raise _refused(f"is more than {MOST_DEPTH} levels deep")
    # Keywords that cannot be followed are refused where somebody insists on them.
    lenient = text.kind == "lenient_json_schema"
    return GrammarText("json_schema", json.dumps(for_grammar(schema, lenient=lenient)))


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return depth


def _check_cost(source: str) -> None:
    try:
        checked = subprocess.run(
            [sys.executable, "-I", str(Path(check_grammar.__file__))],
            # Nothing of this process's own, which has secrets: a stranger's schema is compiled there.
            env={key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH") if key in os.environ},
            input=source,
            capture_output=True,
            text=True,
            timeout=CHECK_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable("the grammar could not be checked in time; try again") from error
    if checked.returncode < 0:
        raise _refused("takes too much time or memory to compile")
    if checked.returncode:
        raise Unavailable("the grammar could not be checked") from RuntimeError(checked.stderr[-2000:])
    if checked.stdout:
        raise _refused(f"cannot be compiled: {_brief(checked.stdout)}")


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest(f"the grammar {why}", code="invalid_grammar")


def _brief(message: str) -> str:
    return " ".join(message.split())[:300]
