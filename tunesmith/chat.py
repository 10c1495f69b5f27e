"""A conversation in a terminal: every question is sent with all that was said before."""

import json as jsons
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from tunesmith.client import ApiError
from tunesmith.output import say

Json = dict[str, Any]
Stream = Callable[[Json], AbstractContextManager[Iterator[Json]]]
RESET = "/reset"


class Conversation:
    """The messages so far; a question that fails is removed again, so that the next one can be asked.

    Args:
        stream: opens the answer to a chat request as OpenAI's chunks; raises ApiError.
        settings: fields of every request but its messages.
    """

    def __init__(self, stream: Stream, settings: Json, system: str | None = None) -> None:
        self._stream = stream
        self._settings = settings
        self._beginning = [{"role": "system", "content": system}] if system else []
        self.messages: list[Json] = list(self._beginning)

    def reset(self) -> None:
        self.messages = list(self._beginning)

    def ask(self, question: str) -> Iterator[str]:
        """The pieces of the answer, as they come; the whole answer then joins the conversation.

        Raises:
            ApiError: refused, or the stream broke off.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        pieces: list[str] = []
        with self._stream(self._settings | {"messages": asked}) as chunks:
            for chunk in chunks:
                text = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                pieces.append(text)
                yield text
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]


def questions() -> Iterator[str]:
    """Lines from stdin, with a prompt on a terminal."""
    while True:
        try:
            if sys.stdin.isatty() and sys.stdout.isatty():
                # Line editing and history for `input`.
                import readline  # noqa: F401

                yield input("> ")
            else:
                line = sys.stdin.readline()
                if not line:
                    return
                yield line.rstrip("\r\n")
        except EOFError:
            print()
            return


def converse(asked: Iterable[str], conversation: Conversation, *, json: bool = False) -> None:
    """Ask every question and print the answers; with `json` every message as one line.

    A question that fails is reported, and the next one is asked.

    Raises:
        ApiError: the key is refused or the model does not exist: no question can be answered.
        SystemExit: 1, when the last question failed.
    """
    failed = False
    for question in asked:
        if question.strip() == RESET:
            conversation.reset()
            say("the conversation begins anew")
        if not question.strip() or question.strip() == RESET:
            continue
        try:
            _answer(question, conversation, json=json)
            failed = False
        except ApiError as error:
            if error.denied:
                raise
            failed = True
            say(f"error: {error.message}")
        except KeyboardInterrupt:
            # Only this answer is cut short; the conversation goes on without it.
            print()
    if failed:
        raise SystemExit(1)


def _answer(question: str, conversation: Conversation, *, json: bool) -> None:
    for piece in conversation.ask(question):
        if not json:
            print(piece, end="", flush=True)
    if not json:
        print()
        return
    for message in conversation.messages[-2:]:
        print(jsons.dumps(message), flush=True)
