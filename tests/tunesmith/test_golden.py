"""Every command that speaks to a gateway, on terminals of 60 and 100 columns: what it writes where, and how it ends.

The gateway is the fake one. `python -m tests.tunesmith.test_golden` writes `golden/` anew; what changed is for eyes.
"""

import contextlib
import hashlib
import io
import os
import pty
import struct
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any, TextIO
from unittest.mock import patch

import pytest
import typer

from tests.tunesmith.fake_gateway import KEY, Answer, FakeGateway, Json, error, job, stream
from tunesmith.cli import app

GOLDEN = Path(__file__).parent / "golden"
WIDTHS = (60, 100)
JOB = "ftjob-97d1e4a353ec0d2f5b6a7c88"
OTHER = "ftjob-ac4fad860e339db25fa6139d"
BASE, JOBS = "smollm2-135m-instruct", "/v1/fine_tuning/jobs"
MODEL = "ft:smollm2-135m-instruct:default:tut:97d1e4a353ec"
# Of the machine, not of a gateway: their tests are in local_stack/ and test_models.py.
LOCAL = ("stack", "keys", "logs")
LOCAL_MODELS = {"models add", "models known", "models prepare"}
ROWS = '{"instruction": "What is 2+2?", "output": "4"}\n'
WARNING = "3 optimizer steps are few (100 is a sensible minimum): more rows or more epochs teach more"
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("--version",),
    ("upload", "new.jsonl"),
    ("upload", "known.jsonl"),
    ("upload", "bad.jsonl"),
    ("upload", "none.jsonl"),
    ("files", "list"),
    ("files", "delete", "file-1"),
    ("preview", "file-1"),
    ("estimate", "file-1"),
    ("train", "known.jsonl", "--suffix", "tut"),
    ("train", "known.jsonl", "--model", "gpt-4o"),
    ("train", "known.jsonl", "--epochs", "0"),
    ("train", "file-1", "--wait"),
    ("train",),
    ("wait", "tut"),
    ("wait", "ftjob-ac"),
    ("wait", "nobody"),
    ("jobs", "wait", "latest"),
    ("jobs", "watch", "tut"),
    ("jobs", "list"),
    ("jobs", "show", "tut"),
    ("jobs", "events", "tut"),
    ("jobs", "metrics", "tut"),
    ("jobs", "metrics", "tut", "--csv"),
    ("jobs", "metrics", "tut", "--plot"),
    ("jobs", "pause", "tut"),
    ("jobs", "resume", "tut"),
    ("jobs", "cancel", "ftjob-"),
    ("jobs", "cancel", "tut"),
    ("models", "list"),
    ("models", "list", "--all"),
    ("models", "delete", "tut"),
    ("models", "delete", "nobody"),
    ("models", "prune"),
    ("models", "prune", "--yes"),
    ("generate", "What is 2+2?", "--adapter", "latest"),
    ("generate", "What is 2+2?", "--adapter", "nobody"),
    ("generate", "What is 2+2?", "--stream"),
    ("chat", "--adapter", "tut"),
)


def installation() -> FakeGateway:
    """One with a finished job and a failed one, which refuses an epoch count of 0, other bases and bad rows."""
    gateway = FakeGateway({})
    _with_files(gateway)
    _with_jobs(gateway)
    _with_models(gateway)
    return gateway


def _with_files(gateway: FakeGateway) -> None:
    dataset = {"format": "instruction", "rows": 3, "duplicates": 0, "warnings": ["fewer than 50 rows; this file has 3"]}
    digest = hashlib.sha256(ROWS.encode()).hexdigest()
    file: Json = {"id": "file-1", "filename": "known.jsonl", "bytes": 141, "sha256": digest, "dataset": dataset}
    piece = {"text": "What is 2+2?", "supervised": False}
    row = {"row": 1, "tokens": 9, "supervised_tokens": 3, "dropped": False, "pieces": [piece]}
    lengths = {"rows": 3, "cut": 0, "dropped": 0, "longest": 12}

    def uploaded(_: Json) -> Answer:
        if b'filename="bad' not in gateway.forms[-1]:
            return 200, file | {"id": "file-2", "filename": "new.jsonl"}
        rows = [{"line": 2, "message": "not JSON"}]
        return error(400, "line 2: not JSON", "invalid_dataset", "file", errors=rows)

    gateway.answers |= {
        "GET /v1/files": (200, {"data": [file], "has_more": False}),
        "POST /v1/files": uploaded,
        "DELETE /v1/files/file-1": (200, {"id": "file-1", "deleted": True}),
        "GET /v1/files/file-1/preview": (200, {"data": [row], "lengths": lengths}),
    }


def _with_jobs(gateway: FakeGateway) -> None:
    done = job("succeeded", id=JOB, suffix="tut", model=BASE, fine_tuned_model=MODEL, base_precision="int8")
    done |= {"progress": {"step": 3, "total_steps": 3, "loss": 1.5551}, "warnings": [WARNING], "created_at": 0}
    failed = job("failed", id=OTHER, model=BASE, error={"code": "x", "message": "no space is left on the disk"})
    now = time.time()
    listed = [done | {"created_at": now - 3 * 3600 - 60}, failed | {"created_at": now - 2 * 86400 - 60}]
    said = (
        ("info", "Started"),
        ("warn", "Worker vm could not go on: the hub could not be reached for TinyLlama/TinyLlama"),
    )
    events = [
        {"id": f"ftevent-{number}", "created_at": number, "level": level, "message": text}
        for number, (level, text) in enumerate(said)
    ]
    page: Json = {"data": events[::-1], "has_more": False}
    points = [{"step": step, "train_loss": 3.0 / step, "learning_rate": 0.0002} for step in (1, 2, 3)]
    known = {"total_steps": 3, "tokens": 90, "supervised_tokens": 6, "minutes": None, "warnings": [WARNING]}
    at_least_one = "Input should be greater than or equal to 1"

    def estimated(body: Json) -> Answer:
        if body.get("hyperparameters") == {"n_epochs": 0}:
            return error(400, at_least_one, "invalid_request", "hyperparameters.n_epochs")
        if body["training_file"] != "file-1":
            return error(400, "no file", "invalid_request", "training_file")
        return 200, known

    gateway.answers |= {
        "POST /v1/fine_tuning/estimates": estimated,
        f"GET {JOBS}": (200, {"data": listed, "has_more": False}),
        f"POST {JOBS}": (200, done | {"status": "queued", "state": "queued"}),
        f"GET {JOBS}/{JOB}": (200, done),
        f"GET {JOBS}/{OTHER}": (200, failed),
        # The one route that answers in two forms: who asks for a stream says where it begins.
        f"GET {JOBS}/{JOB}/events": lambda _: stream(*events) if gateway.resumed else (200, page),
        f"GET {JOBS}/{JOB}/metrics": (200, {"data": points, "has_more": False}),
    }
    for verb, state in (("pause", "pausing"), ("resume", "queued"), ("cancel", "cancelling")):
        gateway.answers[f"POST {JOBS}/{JOB}/{verb}"] = (200, done | {"state": state})


def _with_models(gateway: FakeGateway) -> None:
    base = {"id": BASE, "kind": "base", "parent": None, "state": "not_served", "prepared": True}
    tuned = [
        {"id": name, "kind": kind, "parent": BASE, "state": "published", "prepared": None, "job": JOB}
        for name, kind in ((MODEL, "adapter"), (f"{MODEL}:ckpt-step-1", "checkpoint"))
    ]
    missing = error(404, "no model 'nobody'", "model_not_found")

    def generated(body: Json) -> Answer:
        return missing if body["parameters"].get("adapter_id") == "nobody" else (200, {"generated_text": "4"})

    gateway.answers |= {
        "GET /v1/models": (200, {"data": [base, *tuned]}),
        f"GET /v1/models/{BASE}": (200, base),
        "GET /v1/models/gpt-4o": error(404, "no model 'gpt-4o'", "model_not_found"),
        "DELETE /v1/models/nobody": missing,
        "POST /generate": generated,
        "POST /generate_stream": stream({"token": {"text": "4"}}, done=False),
        "POST /v1/chat/completions": stream({"choices": [{"index": 0, "delta": {"content": "4"}}]}),
    }
    for model in tuned:
        gone = {"id": model["id"], "deleted": True, "freed_bytes": 19_600_000}
        gateway.answers["DELETE /v1/models/" + str(model["id"]).replace(":", "%3A")] = (200, gone)


class Terminal:
    """A pseudo-terminal of some width: a file to write to, and what was written."""

    def __init__(self, width: int) -> None:
        self._ours, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        self.file: TextIO = os.fdopen(theirs, "w")
        self._drawn = bytearray()
        # What is written is read at once: the kernel holds little of it.
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while piece := os.read(self._ours, 65536):
                self._drawn += piece

    def text(self) -> str:
        """All that was written; the terminal is gone then."""
        self.file.close()
        self._reader.join()
        os.close(self._ours)
        return self._drawn.decode().replace("\r\n", "\n")


@contextlib.contextmanager
def _environment(url: str, width: int) -> Iterator[None]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TUNESMITH_", "GITHUB_"))}
    own = {"TUNESMITH_URL": url, "TUNESMITH_API_KEY": KEY, "NO_COLOR": "1", "TERM": "dumb", "TZ": "UTC"}
    before = Path.cwd()
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, kept | own | {"COLUMNS": str(width)}, clear=True),
    ):
        for name in ("known", "new", "bad"):
            rows = ROWS if name == "known" else f"{ROWS}{name}\n"
            (Path(folder) / f"{name}.jsonl").write_text(rows)
        time.tzset()
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
    time.tzset()


def run(arguments: tuple[str, ...], width: int) -> str:
    """One command on terminals: what it wrote to stdout, to stderr (`2>`), and how it ended."""
    out, err, code = Terminal(width), Terminal(width), 0
    with (
        installation() as gateway,
        _environment(gateway.url, width),
        contextlib.redirect_stdout(out.file),
        contextlib.redirect_stderr(err.file),
        patch("sys.stdin", io.StringIO("What is 2+2?\n")),
    ):
        try:
            app(arguments, prog_name="tunesmith")
        except SystemExit as end:
            code = int(end.code or 0)
    said = "".join(f"2> {line}\n" for line in err.text().splitlines())
    return f"$ tunesmith {' '.join(arguments)}\n{out.text()}{said}= {code}\n"


def golden(width: int) -> Path:
    return GOLDEN / f"{width}.txt"


def kept(width: int) -> dict[str, str]:
    """What each command is to write, by its first line."""
    texts = golden(width).read_text().split("\n\n$ ")
    whole = [text if text.startswith("$ ") else f"$ {text}" for text in texts]
    return {text.partition("\n")[0]: text.rstrip("\n") + "\n" for text in whole}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_command_writes_what_it_did(arguments: tuple[str, ...], width: int) -> None:
    text = run(arguments, width)
    assert text.rstrip("\n") + "\n" == kept(width)[text.partition("\n")[0]]


@pytest.mark.parametrize("width", WIDTHS)
def test_no_line_is_broken_by_the_terminal(width: int) -> None:
    for name, text in kept(width).items():
        # But for commands to be copied, and single words that are longer.
        lines = [line.removeprefix("2> ") for line in text.splitlines()[1:]]
        assert [line for line in lines if len(line) > width and " " in line.strip() and "next: " not in line] == [], (
            name
        )


def _commands(group: Any, path: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path}{name} ")
        elif command.callback.__module__.rpartition(".")[2] not in LOCAL:
            yield path + name


def test_every_command_is_among_them() -> None:
    shown = {" ".join(arguments) for arguments in COMMANDS}
    for name in set(_commands(typer.main.get_command(app))) - LOCAL_MODELS:
        assert any(each == name or each.startswith(f"{name} ") for each in shown), name


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for columns in WIDTHS:
        golden(columns).write_text("\n".join(run(arguments, columns) for arguments in COMMANDS))
    sys.exit()
