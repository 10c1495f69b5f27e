"""Which adapter is where: residency, references in flight, pins, the byte budget and who is evicted.

Lives on the event loop, so it needs no locks; reading files happens in a pool, slots are the engine's. Knows no torch
and no HTTP. Adapter ids are immutable on disk; every load gets a uid of its own all the same, so that a request
finishes on what it began with whatever is unloaded and loaded meanwhile.
"""

import asyncio
import itertools
import math
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from services.inference.engine.interface import AdapterWeights, Engine
from shared.datasets.templates import Template
from shared.errors import ArtifactCorrupt, InvalidRequest, NotFound, Overloaded, Unavailable
from shared.logs import get_logger
from shared.storage.artifacts import LocalArtifactStore, Manifest

State = Literal["loading", "resident", "draining"]
_log = get_logger("adapters")


@dataclass(frozen=True, slots=True)
class Checked:
    """An adapter read from disk: verified, of this base, with its prompt format."""

    manifest: Manifest
    weights: AdapterWeights
    template: Template | None


@dataclass(eq=False, slots=True)
class Entry:
    """One load of one adapter.

    Attributes:
        references: requests that use it or wait for it.
        nbytes: 0 until it has been read.
        load_ms: from the start of the load to residency.
        used_at: seconds on the registry's clock when it was asked for last.
        gently: what was used within so many seconds is not evicted for it; 0 for a request, which waits.
    """

    id: str
    uid: str
    used_at: float
    gently: float = math.inf
    state: State = "loading"
    references: int = 0
    pinned: bool = False
    rank: int = 0
    nbytes: int = 0
    step: int | None = None
    template: Template | None = None
    load_ms: float = 0.0
    loaded: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(slots=True)
class Counters:
    loads: int = 0
    failed_loads: int = 0
    evictions: int = 0


class AdapterRegistry:
    """The adapters of one served base.

    Args:
        read: reads and checks an adapter folder; runs in `pool`, blocking; raises NotFound, ArtifactCorrupt or
            InvalidRequest.
        budget: bytes that resident adapters may take together.
        slots: adapters that the engine can hold.
        patience: seconds a load waits for room when everything resident is in use, before 429.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        store: LocalArtifactStore,
        engine: Engine,
        read: Callable[[Path], Checked],
        pool: Executor,
        *,
        budget: int,
        slots: int,
        patience: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._engine, self._read, self._pool = store, engine, read, pool
        self._budget, self._slots, self._patience, self._clock = budget, slots, patience, clock
        self._entries: dict[str, Entry] = {}
        self._draining: set[Entry] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loading = asyncio.Semaphore(4)
        self._room = asyncio.Lock()
        self._freed = asyncio.Event()
        self._numbers = itertools.count(1)
        self.counters = Counters()

    # ------------------------------------------------------------------ requests

    async def acquire(self, adapter_id: str, *, gently: float = 0.0) -> tuple[Entry, float | None]:
        """The adapter, resident and held until `release`; loads it if need be, once for all who ask.

        Args:
            gently: see `load`; who asks without it in mid-load lifts it for all.

        Returns:
            The entry, and the milliseconds this request waited for a load (None if it was resident).

        Raises:
            NotFound: no such adapter.
            InvalidRequest: it cannot be served; the message says why.
            Overloaded: no room, since everything resident is in use.
        """
        entry = self._present(adapter_id)
        entry.gently = min(entry.gently, gently)
        if entry.state == "resident":
            return self._hold(entry), None
        started = time.perf_counter()
        self._hold(entry)
        try:
            await asyncio.shield(entry.loaded)
        except BaseException:
            self.release(entry)
            raise
        return entry, (time.perf_counter() - started) * 1e3

    def release(self, entry: Entry) -> None:
        """The request is done with the adapter."""
        entry.references -= 1
        entry.used_at = self._clock()
        if entry.references == 0:
            if entry.state == "draining" and entry.loaded.done():
                self._spawn(self._free(entry))
            self._freed.set()

    # ------------------------------------------------------------------ administration

    async def load(self, adapter_id: str, *, gently: float = 0.0) -> Entry:
        """Make an adapter resident. Raises as `acquire`.

        Args:
            gently: seconds; what was used within this time is not evicted to make room, and nothing is waited for.
        """
        entry, _ = await self.acquire(adapter_id, gently=gently)
        self.release(entry)
        return entry

    async def pin(self, adapter_id: str, pinned: bool) -> Entry:
        """Keep an adapter resident (loading it), or let it be evicted again. Raises as `acquire`."""
        entry = await self.load(adapter_id) if pinned else self._entries.get(adapter_id)
        if entry is None:
            raise NotFound(f"adapter {adapter_id[:100]} is not resident", code="model_not_found")
        entry.pinned = pinned
        self._freed.set()
        return entry

    def unload(self, adapter_id: str) -> bool:
        """Take an adapter out; requests in flight finish on it. False if it was not here."""
        entry = self._entries.pop(adapter_id, None)
        if entry is not None:
            self._retire(entry)
        return entry is not None

    def entries(self) -> list[Entry]:
        return [*self._entries.values(), *self._draining]

    @property
    def used_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries())

    async def close(self) -> None:
        """End the loads in flight."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ------------------------------------------------------------------ loading

    def _hold(self, entry: Entry) -> Entry:
        entry.references += 1
        entry.used_at = self._clock()
        return entry

    def _present(self, adapter_id: str) -> Entry:
        """The entry of an adapter that still exists on disk, its load begun if there was none."""
        entry = self._entries.get(adapter_id)
        try:
            folder = self._store.adapter(adapter_id)
        except NotFound:
            raise _unknown(adapter_id) from None
        if not folder.is_dir():
            # Deleted from disk behind our back: what is in memory must not outlive it.
            self.unload(adapter_id)
            raise _unknown(adapter_id)
        if entry is None:
            uid = f"{adapter_id}@{next(self._numbers)}"
            entry = self._entries[adapter_id] = Entry(adapter_id, uid, used_at=self._clock())
            self._spawn(self._load(entry, folder))
        return entry

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, entry: Entry, folder: Path) -> None:
        """Read, make room, hand over to the engine; whoever waits on `entry.loaded` learns how it went."""
        started = time.perf_counter()
        try:
            # A few at a time: what has been read and waits for room takes memory outside the budget.
            async with self._loading:
                checked = await asyncio.get_running_loop().run_in_executor(self._pool, self._read, folder)
                await self._reserve(entry, checked.weights)
                entry.step, entry.template = checked.manifest.step, checked.template
                await asyncio.wrap_future(self._engine.load(entry.uid, checked.weights))
        except BaseException as error:
            self.counters.failed_loads += 1
            if self._entries.get(entry.id) is entry:
                del self._entries[entry.id]
            self._draining.discard(entry)
            self._freed.set()
            if not entry.loaded.done():
                entry.loaded.set_exception(_for_the_client(entry.id, error))
                # Read it once: nobody may be waiting any more, and asyncio would complain.
                entry.loaded.exception()
            if not isinstance(error, Exception):
                raise
            _log.warning("adapter not loaded", adapter=entry.id, error=str(error))
            return
        entry.load_ms = (time.perf_counter() - started) * 1e3
        self.counters.loads += 1
        if entry.state == "loading":
            entry.state = "resident"
        entry.loaded.set_result(None)
        if entry.references == 0:
            if entry.state == "draining":
                await self._free(entry)
            self._freed.set()
        _log.info("adapter loaded", adapter=entry.id, rank=entry.rank, bytes=entry.nbytes, ms=round(entry.load_ms, 1))

    async def _reserve(self, entry: Entry, weights: AdapterWeights) -> None:
        """Evict, least recently used first, until the adapter fits, and book its bytes."""
        pinned = [entry for entry in self.entries() if entry.pinned and entry.nbytes]
        if sum(entry.nbytes for entry in pinned) + weights.nbytes > self._budget or len(pinned) >= self._slots:
            raise InvalidRequest(
                f"the adapter takes {weights.nbytes} bytes; the budget is {self._budget}, less what is pinned",
                code="adapter_too_large",
            )
        try:
            async with asyncio.timeout(self._patience), self._room:
                while not self._fits(weights.nbytes):
                    self._freed.clear()
                    if not self._evict_one(entry.gently) and entry.gently:
                        raise Overloaded("no room without evicting what was used a short while ago", retry_after=5)
                    await self._freed.wait()
                entry.nbytes, entry.rank = weights.nbytes, weights.rank
        except TimeoutError:
            raise Overloaded("all adapter slots are in use; try again later", retry_after=5) from None

    def _evict_one(self, gently: float) -> bool:
        """Begin to free the least recently used adapter that nobody uses or has used within `gently` seconds."""
        idle = [e for e in self._entries.values() if e.state == "resident" and not e.references and not e.pinned]
        victim = min(idle, key=lambda entry: entry.used_at, default=None)
        if victim is None or (gently and self._clock() - victim.used_at < gently):
            return False
        del self._entries[victim.id]
        self._retire(victim)
        self.counters.evictions += 1
        return True

    def _fits(self, nbytes: int) -> bool:
        held = [entry for entry in self.entries() if entry.nbytes]
        return len(held) < self._slots and sum(entry.nbytes for entry in held) + nbytes <= self._budget

    def _retire(self, entry: Entry) -> None:
        loading = entry.state == "loading"
        entry.state = "draining"
        self._draining.add(entry)
        if not loading and entry.references == 0:
            self._spawn(self._free(entry))

    async def _free(self, entry: Entry) -> None:
        """Give a drained adapter's slot back."""
        await asyncio.wrap_future(self._engine.unload(entry.uid))
        self._draining.discard(entry)
        self._freed.set()


def _unknown(adapter_id: str) -> NotFound:
    return NotFound(f"no adapter {adapter_id[:100]!r}", code="model_not_found")


def _for_the_client(adapter_id: str, error: BaseException) -> Exception:
    """What the requests waiting for a load are told."""
    if isinstance(error, ArtifactCorrupt):
        # The adapter is at fault, not the server: asking again will not help.
        return InvalidRequest(f"adapter refused: {error.message}", code="adapter_corrupt")
    if isinstance(error, NotFound):
        return _unknown(adapter_id)
    return error if isinstance(error, Exception) else Unavailable("the server is shutting down")
