"""How long a killed training stands still: from SIGKILL to the next optimizer step, with leases as in production.

Runs with `--chaos-rounds N` only. The seconds are the promise: 99 of 100 within 30.
"""

import random
import time
from collections.abc import Iterator

import pytest

from tests.chaos.conftest import Figures
from tests.chaos.stack import Stack, running_stack
from tests.deployment import ENDLESS

pytestmark = [pytest.mark.servers, pytest.mark.timeout(1500)]
KILLS = 20
PROMISE_SECONDS = 30.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("recovery"), leases={}) as stack:
        yield stack


def test_recovery(stack: Stack, figures: Figures) -> None:
    deployment, moment = stack.deployment, random.Random(0)
    job = deployment.create(ENDLESS)
    for _ in range(KILLS):
        # A kill without a new checkpoint would count against the job.
        deployment.wait_for_steps(job, (deployment.steps(job) or [0])[-1])
        time.sleep(moment.uniform(0, 1))
        attempt = deployment.job(job).attempt
        killed = time.time()
        stack.kill_training_child()

        def next_step(attempt: int = attempt, killed: float = killed) -> float:
            now = deployment.job(job)
            written = now.progress.written_at if now.progress else None
            return max(0.0, (written or 0.0) - killed) if now.attempt > attempt else 0.0

        deployment.wait(next_step, "the next step")
        figures.recovery_seconds.append(next_step())
    deployment.openai.fine_tuning.jobs.cancel(job)
    assert figures.recovery(99) <= PROMISE_SECONDS, sorted(figures.recovery_seconds)
