"""What is computed on, and what is said where the GPU that was asked for is not there."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog
import torch

from shared.bases.device import choose_device, driver_version, take_share, why_no_gpu
from shared.errors import TunesmithError
from tests.stack_processes import ROOT, clean_environment

DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.161.08  Release Build\nGCC: 12\n"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    path = tmp_path / "version"
    path.write_text(DRIVER)
    return path


def test_a_gpu_is_taken_where_there_is_one_unless_the_cpu_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # A MOCK of a GPU: nothing is computed on it.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [choose_device(wanted).type for wanted in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]


def test_a_process_takes_its_share_of_a_gpu_and_of_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []
    # A MOCK of a GPU's allocator.
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", taken.append)
    take_share(torch.device("cpu"), 0.5)
    take_share(torch.device("cuda"), 1.0)
    assert taken == []
    take_share(torch.device("cuda"), 0.5)
    assert taken == [0.5]


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_not_there_is_refused_or_told(tmp_path: Path, driver: Path) -> None:
    with pytest.raises(TunesmithError, match="TUNESMITH_DEVICE is cuda, and torch") as refused:
        choose_device("cuda", tmp_path / "none")
    assert refused.value.code == "no_gpu"
    with structlog.testing.capture_logs() as logs:
        assert choose_device("auto", tmp_path / "none").type == "cpu"
        assert logs == []
        assert choose_device("auto", driver).type == "cpu"
    assert [(line["event"], line["log_level"]) for line in logs] == [("computing on the CPU beside a GPU", "warning")]


def test_the_reason_names_build_and_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: Path) -> None:
    assert driver_version(driver) == "535.161.08"
    assert driver_version(tmp_path / "none") is None
    for cuda, file, said in (
        (None, driver, "is a build for CPUs"),
        ("13.0", tmp_path / "none", "built for CUDA 13.0) sees no GPU: there is no NVIDIA driver here"),
        ("13.0", driver, "with NVIDIA driver 535.161.08: the driver is too old"),
    ):
        monkeypatch.setattr(torch, "version", SimpleNamespace(cuda=cuda))
        assert said in why_no_gpu(file)


@pytest.mark.servers
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command",
    [
        ["services.inference"],
        ["celery", "-A", "services.trainer.worker", "worker", "-P", "prefork", "-c", "1"],
        ["shared.installation", "torch"],
    ],
    ids=["inference", "trainer", "doctor"],
)
def test_without_the_gpu_that_it_was_told_to_use_nothing_starts(command: list[str], tmp_path: Path) -> None:
    own = clean_environment()
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=own | {"TUNESMITH_DEVICE": "cuda", "TUNESMITH_HOME": str(tmp_path), "TUNESMITH_INFERENCE_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode not in (0, None)
    assert "TUNESMITH_DEVICE is cuda, and torch" in done.stderr
    assert "Traceback" not in done.stderr
