"""The kill matrix: each fault alone, at moments drawn from a printed seed, with leases as in production.

Runs with `--chaos-rounds N` only. Here, and only here, seconds are asserted: they are the promise.
"""

import random
import time
from collections.abc import Iterator

import pytest

from shared.jobs.spec import State
from tests.chaos.stack import COSTS_THE_LEASE, FAULTS, TEARS, TORN_FILES, Stack, newest_state, running_stack
from tests.site import ENDLESS, LONGER, SHORT


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("matrix"), leases={}) as stack:
        yield stack


@pytest.mark.parametrize("fault", FAULTS)
def test_matrix(stack: Stack, fault: str, round_seed: int) -> None:
    site, moment = stack.site, random.Random(f"{fault} {round_seed}")
    site.uninterrupted(LONGER), site.uninterrupted(SHORT)
    job, *queued = site.create(LONGER), site.create(SHORT), site.create(SHORT)
    site.wait(lambda: site.job(job).state is not State.QUEUED, "the worker")
    delay = moment.uniform(0, 8)
    print(f"{fault}, seed {round_seed}: {delay:.3f} s after the claim")
    time.sleep(delay)
    was_running = site.job(job).state is State.RUNNING
    started = time.monotonic()
    FAULTS[fault](stack)
    if was_running and fault in COSTS_THE_LEASE:
        site.wait(lambda: site.job(job).state.final or site.job(job).attempt == 2, "another start")
        again = time.monotonic() - started
        print(f"claimed again, or ended before, {again:.1f} s after the fault")
        assert again <= 30
    story = site.check_ended_once(job, LONGER)
    assert story.count("Worker worker-1 was lost") == (fault in COSTS_THE_LEASE and site.job(job).attempt == 2)
    for other in queued:
        site.check_ended_once(other, SHORT)
    site.check_nothing_half_written_is_visible()
    site.check_a_new_job_works()


@pytest.mark.parametrize("tear", TEARS)
@pytest.mark.parametrize("file", TORN_FILES)
def test_matrix_of_torn_checkpoints(stack: Stack, file: str, tear: str, round_seed: int) -> None:
    site = stack.site
    site.uninterrupted(LONGER)
    job = site.create(LONGER)
    site.wait_for_steps(job, 100 * (round_seed % 3))
    site.openai.fine_tuning.jobs.pause(job)
    site.wait_for_state(job, State.PAUSED)
    newest = newest_state(stack, job)
    TEARS[tear](newest / file)
    site.openai.fine_tuning.jobs.resume(job)
    story = site.check_ended_once(job, LONGER)
    assert sum(line.startswith(f"Checkpoint {newest.name} cannot be used") for line in story) == 1
    assert any(line.startswith("Resumed from") or line.startswith("No checkpoint can be used") for line in story)
    site.check_nothing_half_written_is_visible()


@pytest.mark.parametrize(("wish", "state"), [("cancel", State.CANCELLED), ("pause", State.PAUSED)])
def test_matrix_of_wishes(stack: Stack, wish: str, state: State, round_seed: int) -> None:
    site, moment = stack.site, random.Random(f"{wish} {round_seed}")
    job = site.create(ENDLESS)
    site.wait(lambda: site.job(job).state is State.RUNNING, "the worker")
    time.sleep(moment.uniform(0, 12))
    before = site.steps(job)
    getattr(site.openai.fine_tuning.jobs, wish)(job)
    seconds = site.wait_for_state(job, state)
    print(f"{wish}: {seconds:.1f} s")
    assert seconds <= 10
    assert site.steps(job)[: len(before)] == before
    site.check_nothing_half_written_is_visible()
    if state is State.PAUSED:
        site.openai.fine_tuning.jobs.cancel(job)
        assert site.job(job).state is State.CANCELLED
