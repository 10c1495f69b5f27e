"""Interrupted anywhere and resumed, a job ends with the very bytes of an uninterrupted one.

The job: 11 rows by 4 (the last step of an epoch is partial), 2 epochs = 6 steps, a checkpoint every 2 steps and per
epoch, dropout on, one row per micro-batch so that there is a middle of a step.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.trainer.contract import Finished, Stopped
from shared.errors import JobFailed
from shared.jobs.spec import JobSpec, LoraSpec
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.manifests import Kind, Manifest
from tests.services.trainer.harness import RecordingSession, TinyJob, instruction_rows, weights_of

pytestmark = pytest.mark.slow

HELD_OUT = instruction_rows(3, start=40)


@pytest.fixture(autouse=True)
def one_row_per_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.trainer.data.layout.CPU_TOKEN_BUDGET", 1)


def spec_on(tiny: TinyJob) -> JobSpec:
    return tiny.spec(validation=HELD_OUT, lora=LoraSpec(dropout=0.3), hyper={"checkpoint_steps": 2})


@pytest.fixture
def spec(tiny: TinyJob) -> JobSpec:
    return spec_on(tiny)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same job in another installation, trained once for all tests."""
    whole, threads = TinyJob(tmp_path_factory.mktemp("uninterrupted")), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("services.trainer.data.layout.CPU_TOKEN_BUDGET", 1)
        torch.set_num_threads(1)
        finished = whole.finish(spec_on(whole), job="ftjob-whole")
    torch.set_num_threads(threads)
    return finished


def same(one: Finished, other: Finished) -> bool:
    """Equal weights, and equal numbers reported but for those that tell of time and memory."""
    measured = {"tokens_per_second", "peak_memory_mb", "tokens_at_once", "mfu"}
    reports = [outcome.report.model_dump(exclude=measured) for outcome in (one, other)]
    return weights_of(one) == weights_of(other) and reports[0] == reports[1]


def candidates(store: LocalArtifactStore, job: str, sessions: list[RecordingSession]) -> list[Path]:
    """What the job store would list: committed checkpoints, newest first."""
    found = {commit.step: token for token, session in enumerate(sessions, 1) for commit in session.commits}
    return [store.checkpoint(job, found[step], step) for step in sorted(found, reverse=True)]


def stop_after(asks: int) -> Callable[[int], bool]:
    """Stop at the so-manieth question, in whatever phase it is asked."""
    left: Iterator[bool] = iter([False] * asks)
    return lambda _steps: next(left, True)


def test_seed_and_dropout_matter_at_all(tiny: TinyJob, spec: JobSpec, uninterrupted: Finished) -> None:
    others = [spec.model_copy(update=change) for change in ({"seed": 43}, {"lora": LoraSpec(dropout=0)})]
    digests = {weights_of(tiny.finish(other, job=f"ftjob-{i}")) for i, other in enumerate(others)}
    assert len(digests | {weights_of(uninterrupted)}) == 3


# Asked twice while preparing, 3 times in the validation before training, then once per row of the steps (4 + 4 + 3 an
# epoch) and of the validations after steps 2, 3, 4 and 6: 39 times in all.
@pytest.mark.parametrize("asks", [*range(0, 39, 3), 1, 4, 5, 38])
def test_stopped_between_any_micro_batches(tiny: TinyJob, spec: JobSpec, uninterrupted: Finished, asks: int) -> None:
    first = RecordingSession(stop=stop_after(asks))
    # A fresh base has no loss of its own yet.
    outcome = tiny.run(spec, first, bases=tiny.fresh_bases())
    assert isinstance(outcome, Stopped)
    done = first.steps[-1].step if first.steps else 0
    assert outcome.step == done
    assert (first.commits[-1].step if first.commits else 0) == done
    second = RecordingSession()
    resumed = tiny.finish(
        spec,
        second,
        token=2,
        candidates=candidates(tiny.store, "ftjob-one", [first]),
        bases=tiny.fresh_bases(),
    )
    assert same(resumed, uninterrupted)
    assert [p.step for p in second.steps] == list(range(done + 1, 7))


def test_stopped_again_and_again(tiny: TinyJob, spec: JobSpec, uninterrupted: Finished) -> None:
    sessions: list[RecordingSession] = []
    for token in range(1, 30):
        session = RecordingSession(stop=stop_after(9))
        found = candidates(tiny.store, "ftjob-one", sessions)
        outcome = tiny.run(spec, session, token=token, candidates=found)
        sessions.append(session)
        if not isinstance(outcome, Stopped):
            break
    assert not isinstance(outcome, Stopped)
    assert len(sessions) > 4
    assert same(outcome, uninterrupted)
    left = list(tiny.store.checkpoints("ftjob-one").rglob("step-*"))
    assert len(left) == 2


class Crash(Exception):
    """Stands for anything that ends a process."""


@pytest.mark.parametrize("step", [2, 3, 4, 6])
@pytest.mark.parametrize("moment", ["before the adapter", "before the state", "before the commit"])
def test_a_crash_during_a_save(
    tiny: TinyJob, spec: JobSpec, uninterrupted: Finished, step: int, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = RecordingSession()

    def crash(*_: object) -> None:
        raise Crash

    def crash_at_commit(at: int) -> None:
        if at == step:
            crash()

    if moment == "before the commit":
        first.on_commit = crash_at_commit
    else:
        real = tiny.store.publish
        kind = "adapter" if moment == "before the adapter" else "checkpoint"

        def publish(staged: Path, target: Path, manifest: object) -> object:
            if (manifest.kind, manifest.step) == (kind, step):  # type: ignore[attr-defined]
                crash()
            return real(staged, target, manifest)  # type: ignore[arg-type]

        monkeypatch.setattr(tiny.store, "publish", publish)
    with pytest.raises(Crash):
        tiny.run(spec, first)
    monkeypatch.undo()
    monkeypatch.setattr("services.trainer.data.layout.CPU_TOKEN_BUDGET", 1)
    assert all(commit.step < step for commit in first.commits)
    resumed = tiny.finish(spec, token=2, candidates=candidates(tiny.store, "ftjob-one", [first]))
    assert same(resumed, uninterrupted)


@pytest.mark.parametrize("damage", ["flipped", "missing file", "no manifest", "gone"])
def test_a_torn_newest_checkpoint_falls_back_to_the_one_before(
    tiny: TinyJob, spec: JobSpec, uninterrupted: Finished, damage: str
) -> None:
    first = RecordingSession(stop=lambda steps: steps == 5)
    tiny.run(spec, first)
    found = candidates(tiny.store, "ftjob-one", [first])
    assert [folder.name for folder in found][:2] == ["step-00000005", "step-00000004"]
    state = found[0] / "state.safetensors"
    if damage == "flipped":
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    elif damage == "missing file":
        state.unlink()
    elif damage == "no manifest":
        (found[0] / "manifest.json").unlink()
    else:
        tiny.store.remove(found[0])
    second = RecordingSession()
    assert same(tiny.finish(spec, second, token=2, candidates=found), uninterrupted)
    messages = [message for _, message, _ in second.events]
    assert any(message.startswith("Checkpoint step-00000005 cannot be used") for message in messages)
    assert "Resumed from the checkpoint at step 4" in messages


def test_with_no_usable_checkpoint_it_starts_again(tiny: TinyJob, spec: JobSpec, uninterrupted: Finished) -> None:
    first = RecordingSession(stop=lambda steps: steps == 3)
    tiny.run(spec, first)
    found = candidates(tiny.store, "ftjob-one", [first])
    for folder in found:
        tiny.store.remove(folder)
    second = RecordingSession()
    assert same(tiny.finish(spec, second, token=2, candidates=found), uninterrupted)
    assert len(second.steps) == 6


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("seed", "seed"),
        ("rows", "training data"),
        ("batch size", "layout"),
        ("learning rate", "hyperparameters"),
        ("rank", "lora"),
        ("precision", "base precision"),
    ],
)
def test_it_refuses_to_continue_another_run(tiny: TinyJob, spec: JobSpec, change: str, named: str) -> None:
    first = RecordingSession(stop=lambda steps: steps == 2)
    tiny.run(spec, first)
    found = candidates(tiny.store, "ftjob-one", [first])
    hyper = {"checkpoint_steps": 2}
    other = {
        "seed": lambda: spec.model_copy(update={"seed": 1}),
        "rows": lambda: tiny.spec(instruction_rows(12), lora=spec.lora, hyper=hyper),
        "batch size": lambda: tiny.spec(lora=spec.lora, hyper=hyper | {"batch_size": 5}),
        "learning rate": lambda: tiny.spec(lora=spec.lora, hyper=hyper | {"learning_rate": 0.5}),
        "rank": lambda: spec.model_copy(update={"lora": LoraSpec(r=4)}),
        "precision": lambda: spec.model_copy(update={"base_precision": "fp32"}),
    }[change]()
    with pytest.raises(JobFailed, match=rf"step 2 cannot be continued exactly.*{named}") as failure:
        tiny.run(other, token=2, candidates=found)
    assert failure.value.code == "resume_mismatch"


def test_another_number_of_threads_is_told_and_refused_if_strict(tiny: TinyJob, spec: JobSpec) -> None:
    first = RecordingSession(stop=lambda steps: steps == 2)
    tiny.run(spec, first)
    found = candidates(tiny.store, "ftjob-one", [first])
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(JobFailed, match=r"step 2 cannot be continued exactly.*threads") as failure:
            tiny.run(spec, token=2, candidates=found, strict_resume=True)
        second = RecordingSession()
        finished = tiny.finish(spec, second, token=3, candidates=found)
    finally:
        torch.set_num_threads(threads)
    assert failure.value.code == "resume_mismatch"
    assert finished.report.steps == 6
    assert [p.step for p in second.steps] == [3, 4, 5, 6]
    (said,) = [message for _, message, _ in second.events if "computes otherwise" in message]
    assert f"threads ({threads} then, {threads + 1} now)" in said


def changed(store: LocalArtifactStore, folder: Path, change: Callable[[Path], None]) -> None:
    """Publish a checkpoint anew with a change in it, so that it verifies."""
    manifest = store.verify(folder, "checkpoint")
    with store.staged() as staged:
        for name in manifest.files:
            shutil.copyfile(folder / name, staged / name)
        change(staged)
        store.remove(folder)
        store.publish(staged, folder, manifest.model_copy(update={"files": {}}))


def without_value(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "state.json").read_text())
        del values[name]
        (folder / "state.json").write_text(json.dumps(values))

    return change


def without_tensors(prefix: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "state.safetensors")
        del tensors[next(name for name in tensors if name.startswith(prefix))]
        save_file(tensors, folder / "state.safetensors")

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(without_value(name) for name in ("identity", "history", "random", "scaler")),
        *(without_tensors(prefix) for prefix in ("weight.", "adam.exp_avg.", "random.cpu")),
        lambda folder: (folder / "state.json").write_text("[]"),
        lambda folder: (folder / "state.safetensors").write_bytes(b"{}"),
    ],
)
def test_a_checkpoint_of_another_form_changes_nothing_and_falls_back(
    tiny: TinyJob, spec: JobSpec, uninterrupted: Finished, change: Callable[[Path], None]
) -> None:
    first = RecordingSession(stop=lambda steps: steps == 5)
    tiny.run(spec, first)
    found = candidates(tiny.store, "ftjob-one", [first])
    changed(tiny.store, found[0], change)
    second = RecordingSession()
    assert same(tiny.finish(spec, second, token=2, candidates=found), uninterrupted)
    messages = [message for _, message, _ in second.events]
    assert any(message.startswith("Checkpoint step-00000005 cannot be used: it ") for message in messages)
    assert "Resumed from the checkpoint at step 4" in messages


def test_what_the_disk_cannot_read_falls_back_and_what_may_be_well_again_does_not(
    tiny: TinyJob, spec: JobSpec, uninterrupted: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = RecordingSession(stop=lambda steps: steps == 5)
    tiny.run(spec, first)
    found = candidates(tiny.store, "ftjob-one", [first])
    verify, number = tiny.store.verify, errno.ESTALE

    def failing(folder: Path, kind: Kind) -> Manifest:
        if folder == found[0]:
            raise OSError(number, os.strerror(number))
        return verify(folder, kind)

    monkeypatch.setattr(tiny.store, "verify", failing)
    with pytest.raises(OSError, match="handle"):
        tiny.run(spec, token=2, candidates=found)
    number = errno.EIO
    second = RecordingSession()
    assert same(tiny.finish(spec, second, token=3, candidates=found), uninterrupted)
    messages = [message for _, message, _ in second.events]
    assert any("the disk cannot read it" in message for message in messages)
    assert "Resumed from the checkpoint at step 4" in messages


def test_a_checkpoint_that_does_not_name_its_processor_is_continued(
    tiny: TinyJob, spec: JobSpec, uninterrupted: Finished
) -> None:
    """As 0.1 wrote them."""
    first = RecordingSession(stop=lambda steps: steps == 3)
    tiny.run(spec, first)
    found = candidates(tiny.store, "ftjob-one", [first])

    def forget(folder: Path) -> None:
        values = json.loads((folder / "state.json").read_text())
        del values["identity"]["processor"]
        (folder / "state.json").write_text(json.dumps(values))

    changed(tiny.store, found[0], forget)
    second = RecordingSession()
    assert same(tiny.finish(spec, second, token=2, candidates=found, strict_resume=True), uninterrupted)
    assert [p.step for p in second.steps] == [4, 5, 6]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import services.trainer.data.layout as layout
from services.trainer.contract import JobRun
from services.trainer.recipe.finetune import finetune
from services.trainer.model.bases import WarmBases
from shared.storage.artifacts import LocalArtifactStore
from shared.bases.catalogue import Base, Catalogue
from shared.jobs.spec import JobSpec
from tests.services.trainer.harness import RecordingSession

torch.set_num_threads(1)
layout.CPU_TOKEN_BUDGET = 1
root, base, spec = Path(sys.argv[1]), Base.model_validate_json(sys.argv[2]), JobSpec.model_validate_json(sys.argv[3])
store = LocalArtifactStore(root)
place = store.place

class Session(RecordingSession):
    def commit_checkpoint(self, *, step, adapter_id, metrics):
        removed = super().commit_checkpoint(step=step, adapter_id=adapter_id, metrics=metrics)
        print(step, flush=True)
        return removed

def killed_while_saving(staged, target):
    if target.name == "step-00000004":
        os.kill(os.getpid(), signal.SIGKILL)
    place(staged, target)

store.place = killed_while_saving
finetune(JobRun("ftjob-one", 1, spec), WarmBases(Catalogue((base,)), store, torch.device("cpu")), store, Session())
"""


def test_a_process_killed_while_saving(tiny: TinyJob, spec: JobSpec, uninterrupted: Finished) -> None:
    """Another process, another warm-up, a real SIGKILL: the bytes are still the same."""
    arguments = [str(tiny.store.root), tiny.base.model_dump_json(), spec.model_dump_json()]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[4],
        env=os.environ | {"PYTHONHASHSEED": "random"},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [line for line in killed.stdout.splitlines() if line.isdigit()] == ["2", "3"]
    found = [tiny.store.checkpoint("ftjob-one", 1, step) for step in (3, 2)]
    assert same(tiny.finish(spec, token=2, candidates=found), uninterrupted)
