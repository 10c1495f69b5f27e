"""Logs as people read them: in the order of their times, whole, safe for a terminal, and as they grow."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.local_stack.log_reader import last_lines, new_lines
from tunesmith.local_stack.log_rotation import rotate


def event(second: int, name: str, **more: Any) -> str:
    return json.dumps({"event": name, "level": "info", "timestamp": f"2026-12-01T10:00:{second:02}Z", **more}) + "\n"


def test_all_services_in_the_order_of_their_times(tmp_path: Path) -> None:
    (tmp_path / "gateway.log").write_text(event(1, "a") + "a plain line\n" + event(5, "c"))
    (tmp_path / "trainer.log").write_text("banner\n" + event(3, "b", job_id="ftjob-1"))
    lines = last_lines(sorted(tmp_path.glob("*.log")), 50)
    assert [line.fields.get("event", line.text) for line in lines] == ["banner", "a", "a plain line", "b", "c"]
    assert "trainer  info     b  job_id=ftjob-1" in lines[3].readable(7)
    assert [line.fields["event"] for line in last_lines(sorted(tmp_path.glob("*.log")), 2)] == ["b", "c"]


def test_an_exception_is_many_lines_and_nothing_acts_on_the_terminal(tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    log.write_text(event(1, "no \x1b[2J", exception="Traceback\n  here\nValueError: \x07"))
    (line,) = last_lines([log], 9)
    assert line.readable(7).splitlines()[1:] == ["    Traceback", "      here", "    ValueError:  "]
    assert "\x1b" not in line.readable(7)


def test_what_is_written_later_follows_through_a_rotation(tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    log.write_text(event(1, "before"))
    written: list[str | None] = [event(2, "one") + '{"event": "hal', 'f"}\n', None, event(3, "after"), "stop\n"]
    writes = iter(written)

    def poll(seconds: float) -> None:
        text = next(writes)
        if text is None:
            assert rotate(tmp_path, most_bytes=1) == [log]
            return
        with log.open("a") as file:
            file.write(text)

    seen = []
    for line in new_lines(lambda: sorted(tmp_path.glob("*.log")), poll):
        seen.append(line.fields.get("event", line.text))
        if seen[-1] == "stop":
            break
    assert seen == ["one", "half", "after", "stop"]


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(pieces=st.lists(st.binary(max_size=60), max_size=8))
def test_bytes_of_any_kind_are_read_whole_and_printed_safely(tmp_path: Path, pieces: list[bytes]) -> None:
    log = tmp_path / "x.log"
    log.write_bytes(b"")
    waiting: Iterator[bytes] = iter([*pieces, b"\nend\n"])

    def poll(seconds: float) -> None:
        with log.open("ab") as file:
            file.write(next(waiting))

    for line in new_lines(lambda: [log], poll):
        assert line.readable(3).isprintable()
        if line.text == "end":
            break
    assert [line.text for line in last_lines([log], 10**6)][-1] == "end"


def logs_command(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tunesmith.cli", "logs", "--home", str(home), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "TZ": "UTC"}, timeout=120)


def test_the_command(tmp_path: Path) -> None:
    done = logs_command(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "'tunesmith up' makes them" in done.stderr
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "gateway.log").write_text(
        event(1, "request", method="GET", path="/v1/models", status=200, ms=1.5)
        + event(2, "request", method="POST", path="/v1/files", status=400, ms=2.5)
    )
    done = logs_command(tmp_path, "gateway")
    assert done.stdout == "2026-12-01 10:00:02  gateway  info     POST /v1/files → 400 (2.5 ms)\n"
    assert len(logs_command(tmp_path, "--all").stdout.splitlines()) == 2
    assert "there are: gateway" in logs_command(tmp_path, "trainer").stderr
