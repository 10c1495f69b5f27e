"""What is shown of a job's events while somebody waits for it."""

from typing import Any

from tests.tunesmith.fake_gateway import FakeGateway, error, job
from tests.tunesmith.test_cli import run
from tunesmith.client import ApiError
from tunesmith.reasons import EVERY, Reasons

Json = dict[str, Any]


class Seen:
    """Keeps notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def saw(self, job: Json) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


def event(number: int, message: str, level: str = "info", kind: str = "message") -> Json:
    return {"id": f"ftevent-{number}", "created_at": number, "level": level, "message": message, "type": kind}


def test_warnings_are_shown_once_and_other_events_while_a_job_waits() -> None:
    log, seen, now = [event(0, "Created fine-tuning job: ftjob-1"), event(1, "few rows", "warn")], Seen(), [0.0]
    asked: list[float] = []

    def events() -> list[Json]:
        asked.append(now[0])
        return log[::-1]

    reasons = Reasons(seen, events, ["few rows"], clock=lambda: now[0])
    reasons.saw(job("queued"))
    assert seen.notes == []
    log += [event(2, "Waits: the disk\x1b[31m is full"), event(3, "no network", "warn"), event(4, "no network", "warn")]
    reasons.saw(job("queued"))
    assert seen.notes == []
    now[0] = EVERY
    reasons.saw(job("queued"))
    assert seen.notes == ["Waits: the disk [31m is full", "warning: no network"]
    # While it trains the progress says enough; a new stage is looked at at once.
    log += [event(5, "Epoch 1 is over"), event(6, "loss", kind="metrics"), event(7, "worker lost", "warn")]
    reasons.saw(job("running"))
    log += [event(8, "too big", "error")]
    reasons.saw(job("failed"))
    assert seen.notes[2:] == ["warning: worker lost"]
    assert asked == [0.0, EVERY, EVERY, EVERY]


def test_a_gateway_that_is_away_is_for_the_one_who_polls_to_tell() -> None:
    def away() -> list[Json]:
        raise ApiError("away")

    seen = Seen()
    Reasons(seen, away).saw(job("queued"))
    assert seen.notes == []


def test_wait_prints_a_jobs_warnings_in_between() -> None:
    route = "/v1/fine_tuning/jobs/ftjob-1"
    events = [event(1, "the hub could not be reached", "warn")]
    last = job("failed", error={"code": "x", "message": "no base"})
    with FakeGateway({f"GET {route}/events": (200, {"data": events, "has_more": False})}) as gateway:
        gateway.answers[f"GET {route}"] = (200, last)
        said = "warning: the hub could not be reached\nfailed: no base\n"
        assert run(gateway, "wait", "ftjob-1") == (5, "", said)
        gateway.answers[f"GET {route}/events"] = error(503, "starting", "unavailable")
        assert run(gateway, "wait", "ftjob-1") == (5, "", "failed: no base\n")
