"""A job's events as they happen: server-sent events, ascending, resumable by `Last-Event-ID`.

SQL is read once a second; whichever gateway the client comes back to goes on where it left off.
"""

import asyncio
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool

from services.gateway.jobs.event_ids import event_id
from services.gateway.jobs.response_schema import event_json
from shared.http.event_stream import DONE, KEEP_ALIVE, encode_event
from shared.jobs.rows import Event
from shared.jobs.store import JobStore
from shared.paging import Page
from shared.storage.database import Database

POLL_SECONDS = 1.0
# Proxies close a connection that is silent for long; comments keep it open and are ignored by every reader.
PING_EVERY_POLLS = 15
PAGE = 100


class EventStream:
    """Reads one job's event log.

    Args:
        after: number of the last event the client has seen.
    """

    def __init__(
        self,
        database: Database,
        store: JobStore,
        project: str,
        job_id: str,
        after: int,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self._database = database
        self._store = store
        self._project = project
        self._job_id = job_id
        self._after = after
        self._poll_seconds = poll_seconds

    async def is_over(self) -> bool:
        """Whether the job has ended and the client has seen all of it.

        Raises:
            NotFound: no such job.
        """
        ended, page = await run_in_threadpool(self._read)
        return ended and not page.items

    async def __aiter__(self) -> AsyncIterator[bytes]:
        silent = 0
        while True:
            ended, page = await run_in_threadpool(self._read)
            for event in page.items:
                self._after = event.number
                name = event_id(event.job, event.number)
                yield encode_event(event_json(event).model_dump_json(), name)
            if page.has_more:
                continue
            if ended:
                yield encode_event(DONE)
                return
            silent = 0 if page.items else silent + 1
            if silent and silent % PING_EVERY_POLLS == 0:
                yield KEEP_ALIVE
            await asyncio.sleep(self._poll_seconds)

    def _read(self) -> tuple[bool, Page[Event]]:
        """Whether the job has ended, and the next events."""
        with self._database.read() as tx:
            # Read before the events: what is written together with the end is still read after it.
            ended = self._store.get(tx, self._project, self._job_id).state.final
            return ended, self._store.events(tx, self._project, self._job_id, after=self._after, limit=PAGE)
