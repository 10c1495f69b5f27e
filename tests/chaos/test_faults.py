"""The promise: an acknowledged job ends once, with the bytes of an undisturbed run, and its events say what happened.

One stack as `tunesmith up` starts it, and one job that suffers one fault after the other.
"""

from collections.abc import Iterator

import pytest

from shared.jobs.spec import State
from tests.chaos.stack import Stack, fill, flipped, newest_state, running_stack, small_disk
from tests.deployment import ENDLESS, LONG, SHORT

pytestmark = pytest.mark.servers

ROWS = b'{"instruction": "a", "output": "b"}\n' * 5000


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with small_disk(64) as disk, running_stack(tmp_path_factory.mktemp("chaos"), disk=disk) as stack:
        yield stack


# ------------------------------------------------------------------------------------------------- what users ask for


def test_cancel_pause_and_resume(stack: Stack) -> None:
    deployment = stack.deployment
    running, waiting, kept = deployment.create(ENDLESS), deployment.create(SHORT), deployment.create(LONG)
    assert deployment.openai.fine_tuning.jobs.cancel(waiting).status == "cancelled"
    assert deployment.messages(waiting)[-1] == "Cancelled before it started"
    assert deployment.openai.fine_tuning.jobs.pause(kept).status == "queued"
    assert deployment.job(kept).state is State.PAUSED

    deployment.wait_for_steps(running)
    assert deployment.openai.fine_tuning.jobs.cancel(running).status == "running"
    deployment.wait_for_state(running, State.CANCELLED)
    assert deployment.steps(running)
    for checkpoint in deployment.openai.fine_tuning.jobs.checkpoints.list(running).data[:2]:
        assert deployment.generate(checkpoint.fine_tuned_model_checkpoint).status_code == 200
    *_, stopped, ended = deployment.messages(running)
    assert stopped.startswith("Stopped on worker worker-1: the checkpoint of step ")
    assert ended == "The job is cancelled, as requested"
    # The checkpoints to resume from are gone once nobody wants it to go on.
    deployment.wait(lambda: not deployment.artifacts.checkpoints(running).exists(), "private state to go")

    deployment.openai.fine_tuning.jobs.resume(kept)
    deployment.wait_for_steps(kept)
    deployment.openai.fine_tuning.jobs.pause(kept)
    deployment.wait_for_state(kept, State.PAUSED)
    paused_at = deployment.steps(kept)[-1]
    assert deployment.openai.fine_tuning.jobs.resume(kept).status == "queued"
    messages = deployment.check_ended_once(kept, LONG)
    assert "Pausing: the worker saves a checkpoint and releases the job" in messages
    assert f"Stopped on worker worker-1: the checkpoint of step {paused_at} is kept" in messages
    assert f"Resumed from the checkpoint at step {paused_at}" in messages
    assert deployment.job(kept).worker_failures == 0
    for ended in (running, kept):
        refused = deployment.http.post(f"/v1/fine_tuning/jobs/{ended}/resume")
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "cannot_resume")


# ------------------------------------------------------------------------------------------------------- faults


def test_one_job_survives_one_fault_after_the_other(stack: Stack) -> None:
    deployment = stack.deployment
    deployment.uninterrupted(LONG), deployment.uninterrupted(SHORT)
    job, *queued = deployment.create(LONG), deployment.create(SHORT), deployment.create(SHORT)
    step = deployment.wait_for_steps(job)
    stack.empty_redis()
    stack.notify_three_times()
    stack.kill_training_child()
    stack.kill_all_at_once("redis", "gateway", "inference")
    # The newest checkpoint does not survive either: the one before it must do, or the beginning.
    torn = newest_state(stack, job)
    flipped(torn / "state.safetensors")
    deployment.wait_for_steps(job, step)
    stack.stop_worker()
    # It left a checkpoint behind; a later one is its successor's.
    deployment.wait_for_steps(job, deployment.steps(job)[-1])
    stack.kill_worker()

    messages = deployment.check_ended_once(job, LONG)
    for other in queued:
        deployment.check_ended_once(other, SHORT)
        assert deployment.job(other).attempt == 1
    deployment.wait(deployment.works, "gateway and inference")
    deployment.check_nothing_half_written_is_visible()
    deployment.check_a_new_job_works()
    assert messages.count("Worker worker-1 was lost") == 2
    assert messages.count("Waiting for a worker to go on from the newest checkpoint") == 2
    assert [line for line in messages if line.startswith("Started again")] == [
        f"Started again (attempt {attempt}) on worker worker-1" for attempt in (2, 3, 4)
    ]
    assert sum(line.startswith(f"Checkpoint {torn.name} cannot be used: ") for line in messages) == 1
    assert sum(line.startswith("Stopped on worker worker-1: the checkpoint of step") for line in messages) == 1
    assert sum(line.startswith(("Resumed from", "No checkpoint can be used")) for line in messages) == 3


def test_redis_dies_while_nobody_works_and_the_worker_hears_again(stack: Stack) -> None:
    stack.kill_redis()
    stack.deployment.check_a_new_job_works()


def test_a_full_disk_is_told_and_survived(stack: Stack) -> None:
    if stack.disk is None:
        pytest.skip("needs the right to mount a file system; test_loop.py has a full disk without one")
    deployment = stack.deployment
    deployment.uninterrupted(LONG)
    job = deployment.create(LONG)
    deployment.wait_for_steps(job)
    filler = stack.disk / "filler"
    fill(filler)
    deployment.wait(lambda: any("No space left" in line for line in deployment.messages(job)), "the worker to notice")
    # What cannot be kept is refused in words, and nothing of it stays.
    refused = deployment.http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", ROWS)})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_full")
    deployment.check_nothing_half_written_is_visible()
    filler.unlink()
    messages = deployment.check_ended_once(job, LONG)
    assert any(line.startswith("Worker worker-1 gives it back: ") for line in messages)
    assert any(line.startswith("Resumed from the checkpoint at step") for line in messages)
    deployment.check_nothing_half_written_is_visible()
    deployment.check_a_new_job_works()
