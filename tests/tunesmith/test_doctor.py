"""`tunesmith doctor` on a healthy installation and on broken ones."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.stack_processes import clean_environment
from tunesmith import doctor
from tunesmith.doctor import last_error
from tunesmith.local_stack.home import Home


def examined(folder: Path, **environ: str) -> tuple[int, dict[str, dict[str, str]]]:
    kept = clean_environment()
    command = [sys.executable, "-m", "tunesmith.cli", "doctor", "--json"]
    done = subprocess.run(command, cwd=folder, env=kept | environ, capture_output=True, text=True, timeout=120)
    return done.returncode, {finding["subject"]: finding for finding in json.loads(done.stdout)}


@pytest.mark.slow
def test_a_fresh_installation_can_work_and_a_broken_catalogue_is_named(tmp_path: Path) -> None:
    code, found = examined(tmp_path)
    assert code == 0
    assert found["torch"]["level"] == found["catalogue"]["level"] == found["redis"]["level"] == "ok"
    assert "smollm2-135m-instruct (prepared when first used)" in found["catalogue"]["detail"]
    assert (found["schema"]["level"], found["stack"]["detail"]) == ("warn", "not running")
    assert found["stack"]["told"] == found["stack"]["detail"]
    # The doctor changes nothing.
    assert not (tmp_path / ".tunesmith").exists()
    (tmp_path / "bad.toml").write_text("not toml")
    code, found = examined(tmp_path, TUNESMITH_CATALOGUE="bad.toml")
    assert (code, found["catalogue"]["level"]) == (1, "fail")
    assert "bad.toml" in found["catalogue"]["detail"]


def test_folder_disk_port_and_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Home(tmp_path / "home")
    place.root.mkdir(mode=0o755)
    (open_to_all,) = doctor._folder(place)
    assert (open_to_all.level, open_to_all.remedy) == ("warn", f"chmod 700 {place.root}")
    monkeypatch.setattr(doctor, "LOW_DISK_BYTES", 1 << 60)
    assert doctor._disk(place).level == "warn"
    monkeypatch.setattr(doctor, "NO_DISK_BYTES", 1 << 60)
    assert doctor._disk(place).level == "fail"
    monkeypatch.setattr(doctor, "is_free", lambda port: False)
    assert [finding.subject for finding in doctor._stack(place, 8000)] == ["stack", "port"]
    log = place.log("gateway")
    assert last_error(log) is None
    log.parent.mkdir()
    events = [{"level": "error", "event": "failed", "error": "no"}, {"level": "info", "event": "up"}]
    log.write_text("\n".join(map(json.dumps, events)) + "\nplain\n[1]\n")
    (finding,) = doctor._logs(place)
    assert (finding.level, finding.detail) == ("warn", "in the last hour: failed: no")
    # What went wrong long ago may be mended by now.
    for hours, found in ((0.1, 1), (2, 0)):
        when = datetime.now(UTC) - timedelta(hours=hours)
        log.write_text(json.dumps({"level": "error", "event": "old", "timestamp": when.isoformat()}) + "\n")
        assert len(list(doctor._logs(place))) == found
