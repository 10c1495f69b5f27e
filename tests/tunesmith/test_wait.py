"""How waiting ends, against a fake gateway behind httpx's MockTransport and a clock that only sleeps move."""

import io
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tunesmith.client import Client
from tunesmith.connection import Connection
from tunesmith.progress import Lines
from tunesmith.wait import Ending, Exit, wait_for_job

Json = dict[str, Any]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


class Notes:
    def __init__(self) -> None:
        self.jobs: list[Json] = []
        self.notes: list[str] = []

    def saw(self, job: Json) -> None:
        self.jobs.append(job)

    def note(self, text: str) -> None:
        self.notes.append(text)


def wait_on(gateway: Callable[[float], httpx.Response], **options: Any) -> tuple[Ending, Notes, Clock]:
    """Wait on a fake gateway that gets the time."""
    clock, notes = Clock(), Notes()
    transport = httpx.MockTransport(lambda request: gateway(clock()))
    with Client(Connection("http://fake", "ts-key"), transport=transport) as client:
        ending = wait_for_job(lambda: client.job("ftjob-1"), notes, clock=clock, sleep=clock.sleep, **options)
    return ending, notes, clock


def job(status: str, **more: Any) -> httpx.Response:
    return httpx.Response(200, json={"id": "ftjob-1", "status": status, "state": status, **more})


@pytest.mark.parametrize(
    ("last", "code", "message"),
    [
        (job("succeeded", fine_tuned_model="ft:m"), Exit.SUCCEEDED, "succeeded: ft:m"),
        (job("failed", error={"code": "oom", "message": "too big"}), Exit.FAILED, "failed: too big"),
        (job("failed", error=None), Exit.FAILED, "failed"),
        (job("cancelled"), Exit.CANCELLED, "cancelled"),
    ],
)
def test_end_of_the_job_is_the_end_of_waiting(last: httpx.Response, code: Exit, message: str) -> None:
    ending, notes, clock = wait_on(lambda now: job("running") if now < 3 else last)
    assert (ending.exit, ending.message) == (code, message)
    assert ending.job == notes.jobs[-1] == last.json()
    assert clock.now == 3


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refused_key_or_unknown_job_ends_at_once(status: int) -> None:
    body = {"error": {"message": "no such job", "code": "not_found", "param": None, "type": "x"}}
    ending, _, clock = wait_on(lambda now: httpx.Response(status, json=body))
    assert (ending.exit, ending.message, ending.job) == (Exit.DENIED, "no such job", None)
    assert clock.now == 0


def restarting(now: float) -> httpx.Response:
    """Runs, is away for 4 minutes in two ways, and comes back with the job done."""
    if now < 5:
        return job("running")
    if now < 100:
        raise httpx.ConnectError("refused")
    if now < 240:
        return httpx.Response(503, json={"error": {"message": "starting", "code": "unavailable"}})
    return job("succeeded", fine_tuned_model="ft:m")


def test_gateway_may_be_away_for_minutes() -> None:
    ending, notes, _ = wait_on(restarting)
    assert ending.exit == Exit.SUCCEEDED
    assert notes.notes == ["cannot reach http://fake: refused; trying again for 300 s", "connected again"]


def test_gateway_that_stays_away_leaves_the_fate_unknown() -> None:
    def gone(now: float) -> httpx.Response:
        if now < 5:
            return job("running")
        raise httpx.ConnectError("refused")

    ending, _, clock = wait_on(gone)
    assert ending.exit == Exit.COULD_NOT_TELL
    assert ending.job is not None
    assert 300 <= clock.now - 4 <= 302


def test_retry_time_starts_anew_after_every_answer() -> None:
    def flapping(now: float) -> httpx.Response:
        if now >= 1500:
            return job("cancelled")
        if now % 250 < 1:
            return job("running")
        raise httpx.ReadTimeout("slow")

    assert wait_on(flapping)[0].exit == Exit.CANCELLED


def test_answer_that_is_no_job_is_not_waited_on() -> None:
    bad = {"error": {"message": "bad request", "code": "invalid_request", "param": None, "type": "x"}}
    ending, _, clock = wait_on(lambda now: httpx.Response(400, json=bad))
    assert ending.exit == Exit.COULD_NOT_TELL
    assert clock.now == 0


def test_full_server_is_asked_again_when_it_says() -> None:
    full = httpx.Response(429, headers={"retry-after": "30"}, json={"error": {"message": "full", "code": "overloaded"}})
    ending, _, clock = wait_on(lambda now: full if now < 30 else job("cancelled"))
    assert ending.exit == Exit.CANCELLED
    assert clock.now == 30


@pytest.mark.parametrize("away", [False, True])
def test_timeout_ends_waiting_not_the_job(away: bool) -> None:
    def gateway(now: float) -> httpx.Response:
        if away and now > 2:
            raise httpx.ConnectError("refused")
        return job("running")

    ending, _, clock = wait_on(gateway, timeout=10)
    assert (ending.exit, ending.message) == (Exit.TIMEOUT, "not finished after 10 s; the job goes on")
    assert ending.job is not None
    assert clock.now <= 10


def test_plain_lines_show_changes_at_once_and_steps_now_and_then() -> None:
    out, clock = io.StringIO(), Clock()
    lines = Lines(out, clock)
    step = {"status": "running", "state": "running", "phase": "training"}
    seen: list[Json] = [
        {"status": "queued", "state": "queued", "progress": {"queue_position": 2, "step": 0, "total_steps": None}},
        {"status": "running", "state": "running", "phase": "preparing", "progress": {"step": 0, "total_steps": None}},
    ]
    progress = {"total_steps": 20, "loss": 2.5, "tokens_per_second": 228.6, "eta_seconds": 61.0}
    seen += [step | {"progress": progress | {"step": number}} for number in range(1, 9)]
    seen += [{"status": "queued", "state": "paused", "progress": {"step": 8, "total_steps": 20}}]
    for job_seen in seen:
        lines.saw(job_seen)
        lines.saw(job_seen)
        clock.sleep(1)
    assert out.getvalue().splitlines() == [
        "queued (position 2)",
        "running preparing",
        "running training 1/20 loss 2.500 229 tokens/s ETA 1:01",
        "running training 6/20 loss 2.500 229 tokens/s ETA 1:01",
        "paused 8/20",
    ]
