"""Asks inference to load each adapter that a job has just published, so that the first request need not wait for it.

Best effort: no adapter in use is evicted for it, it is tried a few times, and if it fails the first request loads the
adapter. Runs in every gateway; however many of them ask, inference loads an adapter once.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from services.gateway.inference.replicas import Replicas
from services.gateway.models.store import Target
from shared.adapters.state import AdapterState
from shared.errors import Unavailable
from shared.jobs.spec import UNFINISHED, State
from shared.logs import get_logger
from shared.storage.database import Database
from shared.storage.tables import adapters, jobs

LOOK_EVERY_SECONDS = 1.0
# Two minutes altogether: inference may be starting, or a network mount may show the folder late.
WAITS_SECONDS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
# An adapter that was used within this time is not evicted for a new one.
RECENT_SECONDS = 600.0
# The adapter is at fault; asking again changes nothing.
_REFUSALS = (400, 422)


class Prefetcher:
    """Watches for jobs that end, and has their final adapters loaded.

    Jobs that ended while no gateway ran are not seen; the first request loads their adapters.

    Args:
        observe: called with how each adapter's prefetch ended: `loaded`, `refused` or `given_up`.
        waits: seconds before each try.
    """

    def __init__(
        self,
        database: Database,
        replicas: Replicas,
        observe: Callable[[str], None] = lambda outcome: None,
        *,
        waits: Sequence[float] = WAITS_SECONDS,
    ) -> None:
        self._database = database
        self._replicas = replicas
        self._observe = observe
        self._waits = waits
        self._unfinished: frozenset[str] = frozenset()
        self._task: asyncio.Task[None] | None = None
        self._log = get_logger("prefetcher")

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="prefetcher")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def published(self) -> list[Target]:
        """The final adapters of the jobs that have ended since the last call; none at the first call. Reads SQL."""
        with self._database.read() as connection:
            unfinished = frozenset(connection.scalars(select(jobs.c.id).where(jobs.c.state.in_(UNFINISHED))))
            ended = self._unfinished - unfinished
            found = (
                select(adapters.c.base, adapters.c.id)
                .join(jobs, jobs.c.adapter == adapters.c.id)
                .where(
                    jobs.c.id.in_(ended), jobs.c.state == State.SUCCEEDED, adapters.c.state == AdapterState.PUBLISHED
                )
            )
            targets = [Target(*row) for row in connection.execute(found)] if ended else []
        # Only now: if something above fails, the next call finds the same jobs again.
        self._unfinished = unfinished
        return targets

    async def prefetch(self, target: Target) -> str:
        """Have an adapter loaded. Returns the outcome; see `observe`."""
        reason = ""
        for wait in self._waits:
            await asyncio.sleep(wait)
            try:
                status = await self._replicas.load(target, protect_recent_seconds=RECENT_SECONDS)
            except Unavailable as error:
                reason = error.message
                continue
            if status == 200:
                self._log.info("adapter prefetched", adapter=target.adapter)
                return "loaded"
            reason = f"inference answered {status}"
            if status in _REFUSALS:
                self._log.warning("adapter refused by inference", adapter=target.adapter, status=status)
                return "refused"
        self._log.info("adapter not prefetched: the first request loads it", adapter=target.adapter, reason=reason)
        return "given_up"

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(LOOK_EVERY_SECONDS)
                try:
                    for target in await run_in_threadpool(self.published):
                        group.create_task(self._observed(target))
                except Exception:
                    # The database may be down for a while; the next look finds the same jobs.
                    self._log.exception("looking for new adapters failed")

    async def _observed(self, target: Target) -> None:
        try:
            self._observe(await self.prefetch(target))
        except Exception:
            self._log.exception("prefetch failed", adapter=target.adapter)
