"""What this installation's workers compute on: what the newest of them said when it took a job, or reported at its end.

Events are dropped in time, reports are not, and neither names a device before the first version that wrote it down.
"""

from typing import cast

from sqlalchemy import Connection, select

from shared.jobs.spec import DeviceKind
from shared.storage.tables import events, jobs

# A job's start is one of many events; those of older jobs need not be read.
SEARCHED_JOBS = 5


def newest_device(connection: Connection) -> DeviceKind | None:
    """What the worker computes on that took a job last; None if no worker has said it yet."""
    # Times are seconds: of two jobs in one, the later created.
    newest = (
        select(jobs.c.id, jobs.c.created_ns)
        .where(jobs.c.started_at.is_not(None))
        .order_by(jobs.c.started_at.desc(), jobs.c.created_ns.desc())
        .limit(SEARCHED_JOBS)
        .subquery()
    )
    said = events.c.data["device"].as_string()
    of_claims = (
        select(said)
        .join(newest, events.c.job == newest.c.id)
        .where(events.c.type == "message", said.is_not(None))
        .order_by(events.c.created_at.desc(), newest.c.created_ns.desc(), events.c.number.desc())
        .limit(1)
    )
    reported = jobs.c.report["device"].as_string()
    of_reports = (
        select(reported)
        .where(reported.is_not(None))
        .order_by(jobs.c.finished_at.desc(), jobs.c.created_ns.desc())
        .limit(1)
    )
    found = connection.scalar(of_claims) or connection.scalar(of_reports)
    return cast(DeviceKind | None, found)
