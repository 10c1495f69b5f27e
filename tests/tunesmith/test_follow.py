"""Following a job's events when the connection comes and goes, on a clock of the test's own."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tunesmith.client import ApiError
from tunesmith.follow import Json, follow

AWAY = ApiError("away")


class Line:
    """A FAKE connection: yields parts of an event log, each attempt as scripted."""

    def __init__(self, *attempts: list[int] | ApiError, end: ApiError | None = AWAY) -> None:
        self.attempts = list(attempts)
        self.end = end
        self.seen: list[str | None] = []
        self.now = 0.0
        self.notes: list[str] = []

    @contextmanager
    def connect(self, after: str | None) -> Iterator[Iterator[Json]]:
        self.seen.append(after)
        attempt = self.attempts.pop(0) if self.attempts else self.end
        if isinstance(attempt, ApiError):
            raise attempt
        yield self._read(attempt or [])

    def _read(self, numbers: list[int]) -> Iterator[Json]:
        for number in numbers:
            self.now += 1000
            yield {"id": str(number)}
        if self.attempts:
            raise AWAY

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def follow(self) -> list[str]:
        events = follow(self.connect, self.notes.append, retry_seconds=10, clock=lambda: self.now, sleep=self.sleep)
        return [event["id"] for event in events]


def test_it_goes_on_after_the_last_event_it_saw() -> None:
    line = Line([1, 2], AWAY, AWAY, [3], [], [4])
    assert line.follow() == ["1", "2", "3", "4"]
    assert line.seen == [None, "2", "2", "2", "3", "3"]
    assert line.notes == ["away; trying again for 10 s", "connected again"] * 3


def test_retry_time_counts_from_the_lost_connection_and_ends() -> None:
    line = Line([1], [2])
    line.attempts.append(AWAY)
    with pytest.raises(ApiError, match="away"):
        line.follow()
    # A long silence between events is no lost connection.
    assert 2010 <= line.now <= 2012


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_final(status: int) -> None:
    line = Line([1], ApiError("no", status=status))
    with pytest.raises(ApiError, match="no"):
        line.follow()
    assert len(line.seen) == 2


def test_a_full_server_says_when_to_come_back() -> None:
    line = Line(ApiError("busy", status=429, retry_after=7), [1])
    assert line.follow() == ["1"]
    assert line.now == 1007
