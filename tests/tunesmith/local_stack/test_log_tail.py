import json
from pathlib import Path

from tunesmith.local_stack.log_tail import log_tail


def test_tail_is_readable_and_of_this_start_only(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("from an earlier start\n")
    start = path.stat().st_size
    assert log_tail(path, start) == "  (empty)"
    failure = {"event": "startup failed", "level": "error", "exception": "Traceback:\n  File x\nTypeError: no", "x": 1}
    with path.open("a") as log:
        log.write("plain\n" + json.dumps({"event": "up", "level": "info"}) + "\n" + json.dumps(failure) + "\n[1]\n7\n")
    assert log_tail(path, start).splitlines() == [
        "  plain",
        "  info: up",
        "  error: startup failed",
        "  Traceback:",
        "    File x",
        "  TypeError: no",
        "  [1]",
        "  7",
    ]
    assert log_tail(path, start, lines=2) == "  [1]\n  7"


def test_tail_of_anything(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(b"\xff" * 200_000 + b"\nlast\n")
    first, last = log_tail(path).splitlines()
    assert len(first) == 502
    assert last == "  last"
