"""Public ids of a job's events: the cursor of event pages and of `Last-Event-ID`."""

import re

from shared.errors import InvalidRequest


def event_id(job_id: str, number: int) -> str:
    """Stable, and ordered by `number` within one job."""
    return f"{_prefix(job_id)}{number}"


def event_number(job_id: str, event: str) -> int:
    """The number in an event's id.

    Raises:
        InvalidRequest: it is no event of the job.
    """
    match = re.fullmatch(re.escape(_prefix(job_id)) + r"(\d{1,18})", event)
    if match is None:
        raise InvalidRequest(f"no event {event[:100]!r} of this job", param="after")
    return int(match[1])


def _prefix(job_id: str) -> str:
    return f"ftevent-{job_id.removeprefix('ftjob-')}-"
