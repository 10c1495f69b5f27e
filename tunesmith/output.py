"""Where commands write: data on stdout, messages on stderr, failures as one line and an exit code."""

import json
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from tunesmith.client import ApiError, Client
from tunesmith.connection import NoConnection, find
from tunesmith.hub_files import HubError
from tunesmith.wait import Exit


def say(text: str) -> None:
    """Print a message for the user to stderr."""
    print(text, file=sys.stderr, flush=True)


def fail(text: str, code: int = 1) -> NoReturn:
    say(f"error: {text}")
    raise SystemExit(code)


def interrupt_on_sigterm() -> None:
    """Handle SIGTERM as Ctrl-C, so that what this process started is stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def show_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def show_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns as wide as their content, never cut: programs read them too."""
    texts = [list(header), *([plain(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(header))]
    for row in texts:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def plain(value: object) -> str:
    """Text without control characters: names and messages come from others, and a terminal would act on them."""
    text = "-" if value is None else str(value)
    return "".join(character if character.isprintable() else " " for character in text)


@contextmanager
def session(timeout: float = 60) -> Iterator[Client]:
    """A client of the running stack; an error inside ends the command.

    Exit codes: 4 when the key is refused or the thing does not exist, else 1.
    """
    try:
        with Client(find(), timeout=timeout) as client:
            yield client
    except NoConnection as error:
        fail(str(error))
    except ApiError as error:
        where = f" [{error.param}]" if error.param and error.param not in error.message else ""
        fail(error.message + where, Exit.DENIED if error.denied else Exit.COULD_NOT_TELL)
    except HubError as error:
        fail(plain(error), Exit.DENIED if error.denied else Exit.COULD_NOT_TELL)
    except OSError as error:
        fail(str(error))
