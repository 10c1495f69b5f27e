from pathlib import Path

from tunesmith.local_stack.log_rotation import rotate
from tunesmith.local_stack.log_tail import log_tail


def test_a_long_log_begins_anew_while_its_writer_goes_on(tmp_path: Path) -> None:
    long, short = tmp_path / "gateway.log", tmp_path / "redis.log"
    short.write_text("x")
    with long.open("a", buffering=1) as writer:
        writer.write("before\n" * 20)
        assert rotate(tmp_path, most_bytes=100) == [long]
        writer.write("after\n")
    assert long.read_text() == "after\n"
    assert long.with_suffix(".log.1").read_text() == "before\n" * 20
    assert (short.read_text(), rotate(tmp_path, most_bytes=100)) == ("x", [])
    # What was noted of the longer log is past its end.
    assert log_tail(long, start=140) == "  after"


def test_a_log_that_cannot_be_kept_is_cut_all_the_same(tmp_path: Path) -> None:
    log = tmp_path / "gateway.log"
    log.write_text("x" * 101)
    log.with_suffix(".log.1").symlink_to("/dev/full")
    assert rotate(tmp_path, most_bytes=100) == [log]
    assert log.read_text() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["gateway.log"]
