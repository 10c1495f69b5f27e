"""The adapters of one served base: loaded from disk when they are asked for, once for all who ask.

Reading files happens in a pool; slots are the engine's; what stays in memory is `residency`'s to decide. Knows no torch
and no HTTP. Adapter ids are immutable on disk; every load gets a uid of its own all the same, so that a request
finishes on what it began with whatever is unloaded and loaded meanwhile.
"""

import asyncio
import itertools
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from services.inference.adapters.residency import Entry, Residency
from services.inference.engine.interface import AdapterWeights, Engine
from shared.datasets.templates import Template
from shared.errors import ArtifactCorrupt, InvalidRequest, NotFound, Unavailable
from shared.logs import get_logger
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.manifests import Manifest

# What has been read and waits for room takes memory outside the budget.
LOADS_AT_ONCE = 4
_log = get_logger("adapters")


@dataclass(frozen=True, slots=True)
class Checked:
    """An adapter read from disk: verified, of this base, with its prompt format."""

    manifest: Manifest
    weights: AdapterWeights
    template: Template | None


class AdapterRegistry:
    """Hands out adapters by id.

    Args:
        read: reads and checks an adapter folder; runs in `pool`, blocking; raises NotFound, ArtifactCorrupt or
            InvalidRequest.
    """

    def __init__(
        self,
        store: LocalArtifactStore,
        engine: Engine,
        read: Callable[[Path], Checked],
        pool: Executor,
        residency: Residency,
    ) -> None:
        self._store, self._engine, self._read, self._pool = store, engine, read, pool
        self._residency = residency
        self._loading = asyncio.Semaphore(LOADS_AT_ONCE)
        self._numbers = itertools.count(1)
        self.loads = 0
        self.failed_loads = 0

    @property
    def evictions(self) -> int:
        return self._residency.evictions

    @property
    def used_bytes(self) -> int:
        return self._residency.used_bytes

    def entries(self) -> list[Entry]:
        return self._residency.all()

    async def close(self) -> None:
        """End the loads in flight."""
        await self._residency.close()

    # ------------------------------------------------------------------ requests

    async def acquire(self, adapter_id: str, *, protect_recent_seconds: float = 0.0) -> tuple[Entry, float | None]:
        """The adapter, resident and held until `release`; loads it if need be, once for all who ask.

        Args:
            protect_recent_seconds: see `load`; a request without it that comes in mid-load lifts it for all.

        Returns:
            The entry, and the milliseconds this request waited for a load (None if it was resident).

        Raises:
            NotFound: no such adapter.
            InvalidRequest: it cannot be served; the message says why.
            Overloaded: no room, since everything resident is in use.
        """
        entry = self._present(adapter_id)
        entry.protect_recent_seconds = min(entry.protect_recent_seconds, protect_recent_seconds)
        if entry.state == "resident":
            return self._residency.hold(entry), None
        started = time.perf_counter()
        self._residency.hold(entry)
        try:
            await asyncio.shield(entry.loaded)
        except BaseException:
            self.release(entry)
            raise
        return entry, (time.perf_counter() - started) * 1e3

    def release(self, entry: Entry) -> None:
        """The request is done with the adapter."""
        self._residency.release(entry)

    # ------------------------------------------------------------------ administration

    async def load(self, adapter_id: str, *, protect_recent_seconds: float = 0.0) -> Entry:
        """Make an adapter resident. Raises as `acquire`.

        Args:
            protect_recent_seconds: what was used within this time is not evicted to make room; then nothing is waited
                for either.
        """
        entry, _ = await self.acquire(adapter_id, protect_recent_seconds=protect_recent_seconds)
        self.release(entry)
        return entry

    async def pin(self, adapter_id: str) -> Entry:
        """Keep an adapter resident, loading it if need be. Raises as `acquire`."""
        entry = await self.load(adapter_id)
        self._residency.pin(entry, True)
        return entry

    def unpin(self, adapter_id: str) -> Entry:
        """Let an adapter be evicted again.

        Raises:
            NotFound: it is not in memory.
        """
        entry = self._residency.get(adapter_id)
        if entry is None:
            raise NotFound(f"adapter {adapter_id[:100]} is not resident", code="model_not_found")
        self._residency.pin(entry, False)
        return entry

    def unload(self, adapter_id: str) -> bool:
        """Take an adapter out; requests in flight finish on it. False if it was not here."""
        return self._residency.remove(adapter_id)

    # ------------------------------------------------------------------ loading

    def _present(self, adapter_id: str) -> Entry:
        """The entry of an adapter that still exists on disk, its load begun if there was none."""
        try:
            folder = self._store.adapter(adapter_id)
        except NotFound:
            raise _unknown(adapter_id) from None
        if not folder.is_dir():
            # Deleted from disk by somebody else: what is in memory must not outlive it.
            self.unload(adapter_id)
            raise _unknown(adapter_id)
        entry = self._residency.get(adapter_id)
        if entry is None:
            entry = self._residency.add(adapter_id, f"{adapter_id}@{next(self._numbers)}")
            self._residency.spawn(self._load(entry, folder))
        return entry

    async def _load(self, entry: Entry, folder: Path) -> None:
        """Read, make room, hand over to the engine; whoever waits on `entry.loaded` learns how it went."""
        started = time.perf_counter()
        try:
            async with self._loading:
                checked = await asyncio.get_running_loop().run_in_executor(self._pool, self._read, folder)
                await self._residency.reserve(entry, checked.weights)
                entry.step, entry.template = checked.manifest.step, checked.template
                await asyncio.wrap_future(self._engine.load(entry.uid, checked.weights))
        except BaseException as error:
            self.failed_loads += 1
            self._residency.failed(entry, _for_the_client(folder, error))
            if not isinstance(error, Exception):
                raise
            _log.warning("adapter not loaded", adapter=entry.id, error=str(error))
            return
        entry.load_ms = (time.perf_counter() - started) * 1e3
        self.loads += 1
        await self._residency.loaded(entry)
        _log.info("adapter loaded", adapter=entry.id, rank=entry.rank, bytes=entry.nbytes, ms=round(entry.load_ms, 1))


def _unknown(adapter_id: str) -> NotFound:
    return NotFound(f"no adapter {adapter_id[:100]!r}", code="model_not_found")


def _for_the_client(folder: Path, error: BaseException) -> Exception:
    """The error that requests waiting for a load get."""
    if isinstance(error, Exception) and not folder.is_dir():
        # Removed while it was read: that is no damage.
        return _unknown(folder.name)
    if isinstance(error, ArtifactCorrupt):
        # The adapter is at fault, not the server: asking again will not help.
        return InvalidRequest(f"adapter refused: {error.message}", code="adapter_corrupt")
    return error if isinstance(error, Exception) else Unavailable("the server is shutting down")
