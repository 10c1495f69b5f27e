"""The kill matrix: each fault alone, at moments drawn from a printed seed, with leases as in production.

Runs with `--chaos-rounds N` only. Here, and only here, seconds are asserted: they are the promise.
"""

import random
import time
from collections.abc import Iterator

import pytest

from shared.jobs.spec import State
from tests.chaos.stack import COSTS_THE_LEASE, FAULTS, TEARS, TORN_FILES, Stack, newest_state, running_stack
from tests.deployment import ENDLESS, LONG, SHORT

pytestmark = [pytest.mark.servers, pytest.mark.timeout(1000)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("matrix"), leases={}) as stack:
        yield stack


# Faults strike at any moment of its first seconds.
LONGER = LONG | {"n_epochs": 8}


@pytest.mark.parametrize("fault", FAULTS)
def test_matrix(stack: Stack, fault: str, round_seed: int) -> None:
    deployment, moment = stack.deployment, random.Random(f"{fault} {round_seed}")
    deployment.uninterrupted(LONGER), deployment.uninterrupted(SHORT)
    job, *queued = deployment.create(LONGER), deployment.create(SHORT), deployment.create(SHORT)
    deployment.wait(lambda: deployment.job(job).state is not State.QUEUED, "the worker")
    delay = moment.uniform(0, 8)
    print(f"{fault}, seed {round_seed}: {delay:.3f} s after the claim")
    time.sleep(delay)
    was_running = deployment.job(job).state is State.RUNNING
    started = time.monotonic()
    FAULTS[fault](stack)
    if was_running and fault in COSTS_THE_LEASE:
        deployment.wait(lambda: deployment.job(job).state.final or deployment.job(job).attempt == 2, "another start")
        again = time.monotonic() - started
        print(f"claimed again, or ended before, {again:.1f} s after the fault")
        assert again <= 30
    messages = deployment.check_ended_once(job, LONGER)
    assert messages.count("Worker worker-1 was lost") == (fault in COSTS_THE_LEASE and deployment.job(job).attempt == 2)
    for other in queued:
        deployment.check_ended_once(other, SHORT)
    deployment.check_nothing_half_written_is_visible()
    deployment.check_a_new_job_works()


@pytest.mark.parametrize("tear", TEARS)
@pytest.mark.parametrize("file", TORN_FILES)
def test_matrix_of_torn_checkpoints(stack: Stack, file: str, tear: str, round_seed: int) -> None:
    deployment = stack.deployment
    deployment.uninterrupted(LONGER)
    job = deployment.create(LONGER)
    deployment.wait_for_steps(job, 50 * (round_seed % 3))
    deployment.openai.fine_tuning.jobs.pause(job)
    deployment.wait_for_state(job, State.PAUSED)
    newest = newest_state(stack, job)
    TEARS[tear](newest / file)
    deployment.openai.fine_tuning.jobs.resume(job)
    messages = deployment.check_ended_once(job, LONGER)
    assert sum(line.startswith(f"Checkpoint {newest.name} cannot be used") for line in messages) == 1
    assert any(line.startswith("Resumed from") or line.startswith("No checkpoint can be used") for line in messages)
    deployment.check_nothing_half_written_is_visible()


@pytest.mark.parametrize(("action", "state"), [("cancel", State.CANCELLED), ("pause", State.PAUSED)])
def test_matrix_of_requested_actions(stack: Stack, action: str, state: State, round_seed: int) -> None:
    deployment, moment = stack.deployment, random.Random(f"{action} {round_seed}")
    # All checkpoints, so that none that was there may be missing afterwards.
    job = deployment.create(ENDLESS, keep_checkpoints=1000)
    deployment.wait(lambda: deployment.job(job).state is State.RUNNING, "the worker")
    time.sleep(moment.uniform(0, 12))
    before = deployment.steps(job)
    getattr(deployment.openai.fine_tuning.jobs, action)(job)
    seconds = deployment.wait_for_state(job, state)
    print(f"{action}: {seconds:.1f} s")
    assert seconds <= 10
    assert deployment.steps(job)[: len(before)] == before
    deployment.check_nothing_half_written_is_visible()
    if state is State.PAUSED:
        deployment.openai.fine_tuning.jobs.cancel(job)
        assert deployment.job(job).state is State.CANCELLED
