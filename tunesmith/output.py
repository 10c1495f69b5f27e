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
from tunesmith.layout import message, printable, table, width_of
from tunesmith.names import Ambiguous, NothingYet, job_id, model_name
from tunesmith.wait import Exit

# More than an installation has, in pages of a hundred.
ALL = 1_000_000


def say(text: str) -> None:
    """Print a message for the user to stderr."""
    print(message(text, width_of(sys.stderr)), file=sys.stderr, flush=True)


def fail(text: str, code: int = 1) -> NoReturn:
    say(f"error: {text}")
    raise SystemExit(code)


def interrupt_on_sigterm() -> None:
    """Handle SIGTERM as Ctrl-C, so that what this process started is stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def show(text: str, indent: str = "") -> None:
    """Print a line for people to stdout; a narrow terminal's further lines begin with `indent`."""
    print(message(text, width_of(sys.stdout), indent), flush=True)


def show_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def show_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns as wide as their content, never cut: programs read them too. A narrow terminal gets records instead."""
    print(table(header, ([plain(cell) for cell in row] for row in rows), width_of(sys.stdout)), end="")


def plain(value: object) -> str:
    """A value for a terminal, without control characters; `-` for none."""
    return printable("-" if value is None else str(value))


@contextmanager
def session(timeout: float = 60) -> Iterator[Client]:
    """A client of the running stack; an error inside ends the command.

    Exit codes: 4 when the key is refused or the thing does not exist, else 1; 1 too for a name of several things.
    """
    keyless = False
    try:
        connection = find()
        keyless = not connection.api_key
        with Client(connection, timeout=timeout) as client:
            yield client
    except NoConnection as error:
        fail(str(error))
    except ApiError as error:
        # Which file it was is said by its name, and 'file' is only the form's word for it.
        named = error.param in (None, "", "file") or str(error.param) in error.message
        where = "" if named else f" [{error.param}]"
        if keyless and error.status == 401:
            where += "\nTUNESMITH_URL is set, so no key is taken from a connection file: set TUNESMITH_API_KEY, too"
        fail(error.message + where, Exit.DENIED if error.denied else Exit.COULD_NOT_TELL)
    except HubError as error:
        fail(plain(error), Exit.DENIED if error.denied else Exit.COULD_NOT_TELL)
    except Ambiguous as error:
        fail("\n  ".join([plain(error), *map(plain, error.candidates)]))
    except NothingYet as error:
        fail(str(error), Exit.DENIED)
    except OSError as error:
        fail(f"{plain(error.filename)}: {error.strerror}" if error.filename and error.strerror else str(error))


def full_job(client: Client, name: str) -> str:
    """The id of a job by any of its names (`names.job_id`); said on stderr if it was called otherwise."""
    return _full("job", name, job_id(name, lambda: client.jobs(ALL)))


def full_model(client: Client, name: str) -> str:
    """The name of a model by any of its names (`names.model_name`); said on stderr if it was called otherwise."""
    return _full("model", name, model_name(name, client.models))


def _full(what: str, name: str, full: str) -> str:
    if full != name:
        say(plain(f"{what} {full}"))
    return full
