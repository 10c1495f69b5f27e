"""The promise: an acknowledged job ends once, with the bytes of an undisturbed run, and its events say what happened.

One stack as `tunesmith up` starts it, and one job that suffers one fault after the other.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from shared.jobs.leases import MAX_LOSSES
from shared.jobs.spec import State
from tests.chaos.stack import Stack, flipped, newest_state, running_stack, small_disk
from tests.site import ENDLESS, LONG, SHORT

ROWS = b'{"instruction": "a", "output": "b"}\n' * 5000


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with small_disk(64) as disk, running_stack(tmp_path_factory.mktemp("chaos"), disk=disk) as stack:
        yield stack


# ------------------------------------------------------------------------------------------------------- wishes


def test_cancel_pause_and_resume(stack: Stack) -> None:
    site = stack.site
    running, waiting, kept = site.create(ENDLESS), site.create(SHORT), site.create(LONG)
    assert site.openai.fine_tuning.jobs.cancel(waiting).status == "cancelled"
    assert site.story(waiting)[-1] == "Cancelled before it started"
    assert site.openai.fine_tuning.jobs.pause(kept).status == "queued"
    assert site.job(kept).state is State.PAUSED

    site.wait_for_steps(running)
    assert site.openai.fine_tuning.jobs.cancel(running).status == "running"
    site.wait_for_state(running, State.CANCELLED)
    assert site.steps(running)
    for checkpoint in site.openai.fine_tuning.jobs.checkpoints.list(running).data[:2]:
        assert site.generate(checkpoint.fine_tuned_model_checkpoint).status_code == 200
    assert site.story(running)[-1].startswith("Stopped on worker worker-1: the checkpoint of step ")
    # The checkpoints to resume from are gone with the wish to go on.
    site.wait(lambda: not site.artifacts.checkpoints(running).exists(), "private state to go")

    site.openai.fine_tuning.jobs.resume(kept)
    site.wait_for_steps(kept)
    site.openai.fine_tuning.jobs.pause(kept)
    site.wait_for_state(kept, State.PAUSED)
    paused_at = site.steps(kept)[-1]
    assert site.openai.fine_tuning.jobs.resume(kept).status == "queued"
    story = site.check_ended_once(kept, LONG)
    assert "Pausing: the worker saves a checkpoint and lets go" in story
    assert f"Stopped on worker worker-1: the checkpoint of step {paused_at} is kept" in story
    assert f"Resumed from the checkpoint at step {paused_at}" in story
    assert site.job(kept).losses == 0
    for ended in (running, kept):
        refused = site.http.post(f"/v1/fine_tuning/jobs/{ended}/resume")
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "cannot_resume")


# ------------------------------------------------------------------------------------------------------- faults


def test_one_job_survives_one_fault_after_the_other(stack: Stack) -> None:
    site = stack.site
    site.uninterrupted(LONG), site.uninterrupted(SHORT)
    job, *queued = site.create(LONG), site.create(SHORT), site.create(SHORT)
    step = site.wait_for_steps(job)
    stack.empty_redis()
    stack.ring_three_times()
    stack.kill_training_child()
    stack.kill_all_at_once("redis", "gateway", "inference")
    # The newest checkpoint does not survive either: the one before it must do, or the beginning.
    torn = newest_state(stack, job)
    flipped(torn / "state.safetensors")
    site.wait_for_steps(job, step)
    stack.stop_worker()
    # It left a checkpoint behind; a later one is its successor's.
    site.wait_for_steps(job, site.steps(job)[-1])
    stack.kill_worker()

    story = site.check_ended_once(job, LONG)
    for other in queued:
        site.check_ended_once(other, SHORT)
        assert site.job(other).attempt == 1
    site.wait(site.works, "gateway and inference")
    site.check_nothing_half_written_is_visible()
    site.check_a_new_job_works()
    assert story.count("Worker worker-1 was lost") == 2
    assert story.count("Waiting for a worker to go on from the newest checkpoint") == 2
    assert [line for line in story if line.startswith("Started again")] == [
        f"Started again (attempt {attempt}) on worker worker-1" for attempt in (2, 3, 4)
    ]
    assert sum(line.startswith(f"Checkpoint {torn.name} cannot be used: ") for line in story) == 1
    assert sum(line.startswith("Stopped on worker worker-1: the checkpoint of step") for line in story) == 1
    assert sum(line.startswith(("Resumed from", "No checkpoint can be used")) for line in story) == 3


def test_redis_dies_while_nobody_works_and_the_worker_hears_again(stack: Stack) -> None:
    stack.kill_redis()
    stack.site.check_a_new_job_works()


def test_a_full_disk_is_told_and_survived(stack: Stack) -> None:
    if stack.disk is None:
        pytest.skip("needs the right to mount a file system; test_work.py has a full disk without one")
    site = stack.site
    site.uninterrupted(LONG)
    job = site.create(LONG)
    site.wait_for_steps(job)
    filler = stack.disk / "filler"
    fill(filler)
    site.wait(lambda: any("No space left" in line for line in site.story(job)), "the worker to notice")
    # What cannot be kept is refused in words, and nothing of it stays.
    refused = site.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", ROWS)})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_full")
    site.check_nothing_half_written_is_visible()
    filler.unlink()
    story = site.check_ended_once(job, LONG)
    assert 1 <= sum(line.startswith("Worker worker-1 could not go on: ") for line in story) < MAX_LOSSES
    assert any(line.startswith("Resumed from the checkpoint at step") for line in story)
    site.check_nothing_half_written_is_visible()
    site.check_a_new_job_works()


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
