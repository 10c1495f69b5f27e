"""Which adapters are in memory: references, pins, the byte budget, and which one is evicted for another.

Lives on the event loop, so it needs no locks around its own state. Reads nothing from disk: `registry` loads.
"""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

from services.inference.engine.interface import AdapterWeights, Engine
from shared.datasets.templates import Template
from shared.errors import InvalidRequest, Overloaded
from shared.inference_api.administration import Residency as State


@dataclass(eq=False, slots=True)
class Entry:
    """One load of one adapter.

    Attributes:
        uid: its name in the engine, another one for each load.
        protect_recent_seconds: what was used within so many seconds is not evicted for it; 0 for a request, which
            waits for room.
        references: requests that use it or wait for it.
        nbytes: 0 until it has been read.
        load_ms: from the start of the load to residency.
        used_at: seconds on the registry's clock when it was asked for last.
        loaded: done when the load has ended, well or not.
    """

    id: str
    uid: str
    used_at: float
    protect_recent_seconds: float = math.inf
    state: State = "loading"
    references: int = 0
    pinned: bool = False
    rank: int = 0
    nbytes: int = 0
    step: int | None = None
    template: Template | None = None
    load_ms: float = 0.0
    loaded: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Residency:
    """The adapters that one engine holds, loads or still has to let go.

    Args:
        budget: bytes that they may take together.
        slots: how many the engine can hold.
        wait_seconds: how long a load waits for room when everything resident is in use, before 429.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        budget: int,
        slots: int,
        wait_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._budget, self._slots, self._wait_seconds, self._clock = budget, slots, wait_seconds, clock
        self._entries: dict[str, Entry] = {}
        self._draining: set[Entry] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Lock()
        self._freed = asyncio.Event()
        self.evictions = 0

    def get(self, adapter_id: str) -> Entry | None:
        """What new requests for an adapter use, resident or being loaded."""
        return self._entries.get(adapter_id)

    def all(self) -> list[Entry]:
        return [*self._entries.values(), *self._draining]

    @property
    def used_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.all())

    # ------------------------------------------------------------------ references

    def add(self, adapter_id: str, uid: str) -> Entry:
        """An adapter whose load begins."""
        entry = self._entries[adapter_id] = Entry(adapter_id, uid, used_at=self._clock())
        return entry

    def hold(self, entry: Entry) -> Entry:
        """Count one more request that uses the adapter or waits for it."""
        entry.references += 1
        entry.used_at = self._clock()
        return entry

    def release(self, entry: Entry) -> None:
        """The request is done with the adapter."""
        entry.references -= 1
        entry.used_at = self._clock()
        if entry.references == 0:
            if entry.state == "draining" and entry.loaded.done():
                self.spawn(self._free(entry))
            self._freed.set()

    def pin(self, entry: Entry, pinned: bool) -> None:
        entry.pinned = pinned
        self._freed.set()

    # ------------------------------------------------------------------ loads

    async def reserve(self, entry: Entry, weights: AdapterWeights) -> None:
        """Evict, least recently used first, until the adapter fits, and book its bytes.

        Raises:
            InvalidRequest: code `adapter_too_large`; it can never fit.
            Overloaded: everything resident is in use, or was used too recently to be evicted for it.
        """
        pinned = [other for other in self.all() if other.pinned and other.nbytes]
        if sum(other.nbytes for other in pinned) + weights.nbytes > self._budget or len(pinned) >= self._slots:
            raise InvalidRequest(
                f"the adapter takes {weights.nbytes} bytes; the budget is {self._budget}, less what is pinned",
                code="adapter_too_large",
            )
        try:
            async with asyncio.timeout(self._wait_seconds), self._room:
                while not self._fits(weights.nbytes):
                    self._freed.clear()
                    if not self._evict_one(entry.protect_recent_seconds) and entry.protect_recent_seconds:
                        raise Overloaded("no room without evicting what was used a short while ago", retry_after=5)
                    await self._freed.wait()
                entry.nbytes, entry.rank = weights.nbytes, weights.rank
        except TimeoutError:
            raise Overloaded("all adapter slots are in use; try again later", retry_after=5) from None

    async def loaded(self, entry: Entry) -> None:
        """The engine has the adapter."""
        if entry.state == "loading":
            entry.state = "resident"
        entry.loaded.set_result(None)
        if entry.references == 0:
            if entry.state == "draining":
                await self._free(entry)
            self._freed.set()

    def failed(self, entry: Entry, error: Exception) -> None:
        """The load has ended with an error, which everybody who waits for it gets."""
        if self._entries.get(entry.id) is entry:
            del self._entries[entry.id]
        self._draining.discard(entry)
        self._freed.set()
        if not entry.loaded.done():
            entry.loaded.set_exception(error)
            # Read once: if nobody waits any more, asyncio would complain.
            entry.loaded.exception()

    # ------------------------------------------------------------------ leaving memory

    def remove(self, adapter_id: str) -> bool:
        """Take an adapter out; requests in flight finish on it. False if it was not here."""
        entry = self._entries.pop(adapter_id, None)
        if entry is not None:
            self._retire(entry)
        return entry is not None

    def spawn(self, work: Coroutine[object, object, None]) -> None:
        """Run beside the requests; ended by `close`."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End the loads in flight."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _evict_one(self, protect_recent_seconds: float) -> bool:
        """Begin to free the least recently used adapter without requests, unless it was used too recently."""
        idle = [e for e in self._entries.values() if e.state == "resident" and not e.references and not e.pinned]
        victim = min(idle, key=lambda entry: entry.used_at, default=None)
        if victim is None or (protect_recent_seconds and self._clock() - victim.used_at < protect_recent_seconds):
            return False
        del self._entries[victim.id]
        self._retire(victim)
        self.evictions += 1
        return True

    def _fits(self, nbytes: int) -> bool:
        held = [entry for entry in self.all() if entry.nbytes]
        return len(held) < self._slots and sum(entry.nbytes for entry in held) + nbytes <= self._budget

    def _retire(self, entry: Entry) -> None:
        loading = entry.state == "loading"
        entry.state = "draining"
        self._draining.add(entry)
        if not loading and entry.references == 0:
            self.spawn(self._free(entry))

    async def _free(self, entry: Entry) -> None:
        """Give a drained adapter's slot back."""
        await asyncio.wrap_future(self._engine.unload(entry.uid))
        self._draining.discard(entry)
        self._freed.set()
