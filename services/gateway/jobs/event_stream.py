"""A job's events as they happen: server-sent events, ascending, resumable by `Last-Event-ID`.

SQL is asked once a second; whichever gateway the client comes back to goes on where it left off.
"""

import asyncio
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool

from services.gateway.jobs.response_schema import event_id, event_json
from shared.http.event_stream import DONE, KEEP_ALIVE, encode_event
from shared.jobs.rows import Event, Page
from shared.jobs.store import JobStore

POLL_SECONDS = 1.0
# Proxies close a connection that is silent for long; comments keep it open and are ignored by every reader.
PING_EVERY_POLLS = 15
PAGE = 100


class EventStream:
    """Reads one job's story.

    Args:
        after: number of the last event the client has seen.
    """

    def __init__(
        self, store: JobStore, project: str, job_id: str, after: int, poll_seconds: float = POLL_SECONDS
    ) -> None:
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
        ended = await self._ended()
        return ended and not (await self._next()).items

    async def __aiter__(self) -> AsyncIterator[bytes]:
        silent = 0
        while True:
            # Asked before the events: what is written together with the end is still read after it.
            ended = await self._ended()
            page = await self._next()
            for event in page.items:
                self._after = event.number
                yield encode_event(event_json(event).model_dump_json(), event_id(event))
            if page.has_more:
                continue
            if ended:
                yield encode_event(DONE)
                return
            silent = 0 if page.items else silent + 1
            if silent and silent % PING_EVERY_POLLS == 0:
                yield KEEP_ALIVE
            await asyncio.sleep(self._poll_seconds)

    async def _ended(self) -> bool:
        return (await run_in_threadpool(self._store.get, self._project, self._job_id)).state.final

    async def _next(self) -> Page[Event]:
        return await run_in_threadpool(self._store.events, self._project, self._job_id, after=self._after, limit=PAGE)
