"""What workers say of themselves while they take no jobs, on both databases."""

from shared.jobs.worker_outages import ANY_BASE, WorkerOutage, WorkerOutages
from shared.storage.database import Database


def test_an_outage_lasts_until_it_is_ended_or_its_time_and_a_minute_are_over(database: Database) -> None:
    now = 1_000.0
    outages = WorkerOutages(database, lambda: int(now * 1e9))
    outages.begin("b", 10)
    outages.begin("a", 20, "big")
    outages.begin("a", 300)
    assert outages.read() == [WorkerOutage("a", ANY_BASE), WorkerOutage("a", "big"), WorkerOutage("b", ANY_BASE)]
    outages.end("a", [ANY_BASE])
    assert outages.read() == [WorkerOutage("a", "big"), WorkerOutage("b", ANY_BASE)]
    now += 71
    assert outages.read() == [WorkerOutage("a", "big")]
    # Begun again, it lasts for longer.
    outages.begin("a", 40, "big")
    now += 99
    assert outages.read() == [WorkerOutage("a", "big")]
    outages.end("a", [ANY_BASE, "big"])
    assert outages.read() == []


def test_what_vanished_workers_left_goes(database: Database) -> None:
    now = 1_000.0
    outages = WorkerOutages(database, lambda: int(now * 1e9))
    outages.begin("gone", 10)
    now += 1_000
    outages.begin("here", 10)
    now -= 1_000
    assert outages.read() == [WorkerOutage("here", ANY_BASE)]
