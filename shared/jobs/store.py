"""Jobs as clients see them: create, read, and request an action (cancel, pause, resume).

SQL is the truth. Everything here happens in the caller's transaction: a change of a job and the event that reports it
are written together, and the event's number is taken in the same UPDATE as the job row, so numbers have no gaps and no
order but theirs. What a worker does is in `shared.jobs.leases`.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select

from shared.clock import Nanoseconds, seconds_of
from shared.errors import InvalidRequest, NotFound
from shared.jobs.rows import (
    Checkpoint,
    Event,
    Job,
    NewEvent,
    change_job,
    jobs_of,
    read_job,
    select_checkpoints,
    select_jobs,
)
from shared.jobs.spec import JobSpec, State, may_become
from shared.paging import Cursor, Page, keyset_page
from shared.storage.artifacts import new_id
from shared.storage.tables import checkpoints, events, further_training_files, jobs


class JobStore:
    """Everything a gateway does with jobs. A job of another project is not found."""

    def __init__(self, now: Nanoseconds = time.time_ns) -> None:
        self._now = now

    def create(
        self,
        tx: Connection,
        project: str,
        spec: JobSpec,
        *,
        metadata: Mapping[str, str] | None = None,
        warnings: Sequence[str] = (),
    ) -> Job:
        """Write a queued job and its first events."""
        job_id = new_id("ftjob")
        now = self._now()
        row = {
            "id": job_id,
            "project": project,
            "created_ns": now,
            "state": State.QUEUED,
            "spec": spec.model_dump(mode="json"),
            "training_file": spec.training_file,
            "validation_file": spec.validation_file,
            "metadata": dict(metadata) if metadata is not None else None,
            "warnings": list(warnings),
        }
        created = [NewEvent(f"Created fine-tuning job: {job_id}"), *(NewEvent(text, level="warn") for text in warnings)]
        created.append(NewEvent("Waiting for a worker"))
        tx.execute(insert(jobs).values(row))
        if spec.further_training_files:
            further = [{"job": job_id, "file": file.id} for file in spec.further_training_files]
            tx.execute(insert(further_training_files), further)
        change_job(tx, job_id, [], {}, created, now)
        return self.get(tx, project, job_id)

    def get(self, tx: Connection, project: str, job_id: str, *, lock: bool = False) -> Job:
        """One job.

        Args:
            lock: see `read_job`.

        Raises:
            NotFound: no such job.
        """
        job = read_job(tx, job_id, lock=lock)
        if job.project != project:
            raise NotFound(f"no fine-tuning job {job_id[:100]!r}")
        return job

    def list(
        self,
        tx: Connection,
        project: str,
        *,
        after: str | None = None,
        limit: int = 20,
        metadata: Mapping[str, str] | None = None,
    ) -> Page[Job]:
        """Jobs newest first, after (not including) the job `after`; all of `metadata` must match.

        Raises:
            InvalidRequest: `after` is no job of the project.
        """
        query = select_jobs().where(jobs.c.project == project)
        for key, value in (metadata or {}).items():
            query = query.where(jobs.c.metadata[key].as_string() == value)
        keys = (jobs.c.created_ns, jobs.c.id)
        cursor = Cursor(after, select(*keys).where(jobs.c.id == after, jobs.c.project == project)) if after else None
        page = keyset_page(tx, query, keys, limit=limit, after=cursor)
        return Page(jobs_of(tx, page.items), page.has_more)

    def events(
        self,
        tx: Connection,
        project: str,
        job_id: str,
        *,
        before: int | None = None,
        after: int | None = None,
        limit: int = 20,
    ) -> Page[Event]:
        """Events newest first below number `before`; or, if `after` is given, ascending above it.

        Raises:
            NotFound: no such job.
        """
        self._require(tx, project, job_id)
        query = select(events).where(events.c.job == job_id)
        if after is not None:
            query = query.where(events.c.number > after)
        elif before is not None:
            query = query.where(events.c.number < before)
        page = keyset_page(tx, query, (events.c.number,), limit=limit, descending=after is None)
        return page.map(lambda row: Event(*row))

    def forget_events(self, tx: Connection, *, after_seconds: float, most: int = 20) -> int:
        """Drop the events of some jobs that ended that long ago, and with them their metric series.

        Args:
            most: jobs, so that the transaction is short.

        Returns:
            How many events went.
        """
        before = seconds_of(self._now()) - after_seconds
        old = select(jobs.c.id).join(events, events.c.job == jobs.c.id).where(jobs.c.finished_at < before)
        ids = list(tx.scalars(old.distinct().limit(most)))
        return tx.execute(delete(events).where(events.c.job.in_(ids))).rowcount

    def checkpoints(
        self, tx: Connection, project: str, job_id: str, *, after: str | None = None, limit: int = 10
    ) -> Page[Checkpoint]:
        """Checkpoints newest first.

        Raises:
            NotFound: no such job.
            InvalidRequest: `after` is no checkpoint of the job.
        """
        self._require(tx, project, job_id)
        c = checkpoints.c
        cursor = Cursor(after, select(c.step).where(c.id == after, c.job == job_id)) if after else None
        page = keyset_page(tx, select_checkpoints(job_id), (c.step,), limit=limit, after=cursor)
        return page.map(lambda row: Checkpoint(*row))

    def metrics(
        self, tx: Connection, project: str, job_id: str, *, after_step: int, limit: int
    ) -> Page[dict[str, Any]]:
        """What the job measured while it trained, by ascending step. The last report of a step that was repeated wins.

        Raises:
            NotFound: no such job.
        """
        self._require(tx, project, job_id)
        step = events.c.data["step"].as_integer()
        newest = func.row_number().over(partition_by=step, order_by=events.c.number.desc())
        points = (
            select(events.c.data, step.label("step"), newest.label("age"))
            .where(events.c.job == job_id, events.c.type == "metrics", step > after_step)
            .subquery()
        )
        query = select(points.c.data).where(points.c.age == 1)
        page = keyset_page(tx, query, (points.c.step,), limit=limit, descending=False)
        return page.map(lambda row: dict(row.data))

    def cancel(self, tx: Connection, project: str, job_id: str) -> Job:
        """Cancel at once what waits; ask the worker of what runs. Asking again changes nothing.

        Raises:
            NotFound: no such job.
            InvalidRequest: it has succeeded or failed.
        """
        idle = NewEvent("Cancelled before it started")
        requested = NewEvent("Cancelling: the worker stops and keeps the checkpoints made so far")
        return self._request(tx, project, job_id, "cancel", State.CANCELLED, idle, State.CANCELLING, requested)

    def pause(self, tx: Connection, project: str, job_id: str) -> Job:
        """Pause at once what waits; ask the worker of what runs to save a checkpoint and release the job.

        Raises:
            NotFound: no such job.
            InvalidRequest: the job has ended or is being cancelled.
        """
        idle = NewEvent("Paused")
        requested = NewEvent("Pausing: the worker saves a checkpoint and releases the job")
        return self._request(tx, project, job_id, "pause", State.PAUSED, idle, State.PAUSING, requested)

    def resume(self, tx: Connection, project: str, job_id: str) -> Job:
        """Queue a paused job again; what is queued or running already is left as it is.

        Raises:
            NotFound: no such job.
            InvalidRequest: the job has ended, or is pausing or being cancelled.
        """
        job = self.get(tx, project, job_id, lock=True)
        if job.state in (State.QUEUED, State.RUNNING):
            return job
        if job.state is not State.PAUSED:
            raise _refused("resume", job)
        paused = [jobs.c.state == State.PAUSED]
        resumed = NewEvent("Resumed: waiting for a worker")
        change_job(tx, job_id, paused, {"state": State.QUEUED}, [resumed], self._now())
        return self.get(tx, project, job_id)

    def _request(
        self,
        tx: Connection,
        project: str,
        job_id: str,
        verb: str,
        idle: State,
        done: NewEvent,
        leased: State,
        requested: NewEvent,
    ) -> Job:
        job = self.get(tx, project, job_id, lock=True)
        if job.state in (idle, leased):
            return job
        for target, event in ((idle, done), (leased, requested)):
            # An idle job ends here; a leased one only by its worker, which must write the end under its token.
            sources = [state for state in may_become(target) if state.leased == (target is leased)]
            if job.state in sources:
                values = {"state": target} | ({"finished_at": seconds_of(self._now())} if target.final else {})
                change_job(tx, job_id, [jobs.c.state == job.state], values, [event], self._now())
                return self.get(tx, project, job_id)
        raise _refused(verb, job)

    def _require(self, tx: Connection, project: str, job_id: str) -> None:
        mine = select(jobs.c.id).where(jobs.c.id == job_id, jobs.c.project == project)
        if tx.execute(mine).first() is None:
            raise NotFound(f"no fine-tuning job {job_id[:100]!r}")


def _refused(verb: str, job: Job) -> InvalidRequest:
    # 400, not 409: OpenAI's clients send a 409 three times.
    return InvalidRequest(f"cannot {verb} {job.id}: it is {job.state.value}", code=f"cannot_{verb}")
