"""The adapter registry by itself, on an engine whose loads take as long as the test wants."""

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from services.inference.adapters.registry import AdapterRegistry, Checked
from services.inference.adapters.residency import Residency
from services.inference.engine.interface import GenerationRequest, Sink, Stats
from shared.errors import InvalidRequest, NotFound, Overloaded
from tests.services.inference.harness import Tiny


class SlowEngine:
    """Stands for an engine whose loads end when the test says so, or at once; only those are asked for here."""

    context = 100

    def __init__(self, *, at_once: bool = False) -> None:
        self._at_once = at_once
        self.loads: list[tuple[str, Future[None]]] = []
        self.unloaded: list[str] = []

    def load(self, uid: str, weights: Any) -> "Future[None]":
        done: Future[None] = Future()
        self.loads.append((uid, done))
        if self._at_once:
            done.set_result(None)
        return done

    def unload(self, uid: str) -> "Future[None]":
        self.unloaded.append(uid)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def submit(self, request: GenerationRequest, sink: Sink, place: Any = None) -> Any:
        raise NotImplementedError

    def cancel(self, handle: Any) -> None:
        raise NotImplementedError

    def stats(self) -> Stats:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class Weights:
    rank = 8
    nbytes = 10


def registry(tiny: Tiny, engine: SlowEngine, **limits: Any) -> AdapterRegistry:
    def read(folder: Path) -> Checked:
        return Checked(tiny.store.verify(folder, "adapter"), Weights(), None)

    pool = ThreadPoolExecutor(1)
    residency = Residency(engine, **{"budget": 100, "slots": 2, "wait_seconds": 0.2} | limits)
    return AdapterRegistry(tiny.store, engine, read, pool, residency)


async def until(condition: Any) -> None:
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110 -- what is waited for happens in a thread
            await asyncio.sleep(0.005)


def test_one_load_for_all_who_ask_and_a_quitter_does_not_end_it(tiny: Tiny, adapters: list[str]) -> None:
    async def scenario() -> None:
        engine = SlowEngine()
        held = registry(tiny, engine)
        tasks = [asyncio.create_task(held.acquire(adapters[0])) for _ in range(3)]
        await until(lambda: engine.loads)
        tasks[0].cancel()
        await asyncio.sleep(0)
        assert [entry.state for entry in held.entries()] == ["loading"]
        engine.loads[0][1].set_result(None)
        (entry, waited), (same, _) = await asyncio.gather(*tasks[1:])
        assert entry is same
        assert waited is not None
        assert (len(engine.loads), entry.references, entry.state) == (1, 2, "resident")
        assert (await held.acquire(adapters[0]))[1] is None

    asyncio.run(scenario())


def test_unloading_in_mid_load_frees_the_slot_once(tiny: Tiny, adapters: list[str]) -> None:
    async def scenario() -> None:
        engine = SlowEngine()
        held = registry(tiny, engine)
        task = asyncio.create_task(held.acquire(adapters[0]))
        await until(lambda: engine.loads)
        assert held.unload(adapters[0])
        task.cancel()
        await asyncio.sleep(0.02)
        assert engine.unloaded == []
        engine.loads[0][1].set_result(None)
        await until(lambda: engine.unloaded)
        assert engine.unloaded == [engine.loads[0][0]]
        assert held.entries() == []

    asyncio.run(scenario())


def test_a_full_house_waits_for_a_release_and_else_says_so(
    tiny: Tiny, adapters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        engine = SlowEngine()
        held = registry(tiny, engine, slots=1)
        first = asyncio.create_task(held.acquire(adapters[0]))
        await until(lambda: engine.loads)
        engine.loads[0][1].set_result(None)
        entry, _ = await first
        with pytest.raises(Overloaded):
            await held.acquire(adapters[1])
        monkeypatch.setattr(held._residency, "_wait_seconds", 120)
        second = asyncio.create_task(held.acquire(adapters[1]))
        await asyncio.sleep(0.02)
        held.release(entry)
        await until(lambda: len(engine.loads) == 2)
        engine.loads[1][1].set_result(None)
        await second
        assert engine.unloaded == [entry.uid]
        assert held.evictions == 1

    asyncio.run(scenario())


def test_an_engine_that_fails_to_load_is_an_error_for_those_who_wait(tiny: Tiny, adapters: list[str]) -> None:
    async def scenario() -> None:
        engine = SlowEngine()
        held = registry(tiny, engine)
        task = asyncio.create_task(held.acquire(adapters[0]))
        await until(lambda: engine.loads)
        engine.loads[0][1].set_exception(InvalidRequest("no"))
        with pytest.raises(InvalidRequest):
            await task
        assert (held.entries(), held.used_bytes, held.failed_loads) == ([], 0, 1)
        with pytest.raises(NotFound):
            await held.acquire("adapter-none")

    asyncio.run(scenario())


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_what_was_used_recently_is_not_evicted_for_a_load_that_protects_it(tiny: Tiny, adapters: list[str]) -> None:
    async def scenario() -> None:
        engine, clock = SlowEngine(at_once=True), Clock()
        held = registry(tiny, engine, clock=clock)
        first, second, third, fourth = adapters
        await held.load(first, protect_recent_seconds=60)
        clock.now += 50
        await held.load(second)
        clock.now += 5
        # Both have been used within a minute: no room, and that is said at once.
        with pytest.raises(Overloaded):
            await held.load(third, protect_recent_seconds=60)
        assert ({entry.id for entry in held.entries()}, held.evictions) == ({first, second}, 0)
        clock.now += 5
        await held.load(third, protect_recent_seconds=60)
        assert ({entry.id for entry in held.entries()}, held.evictions) == ({second, third}, 1)
        # What is there already stays and needs no room; a request takes it as ever.
        clock.now += 1
        await held.load(second, protect_recent_seconds=60)
        await held.load(fourth)
        assert {entry.id for entry in held.entries()} == {second, fourth}

    asyncio.run(scenario())


@pytest.mark.parametrize("kept", ["in use", "pinned"])
def test_a_protecting_load_evicts_nothing_in_use_or_pinned(tiny: Tiny, adapters: list[str], kept: str) -> None:
    async def scenario() -> None:
        engine, clock = SlowEngine(at_once=True), Clock()
        held = registry(tiny, engine, clock=clock, slots=1)
        entry, _ = await held.acquire(adapters[0])
        if kept == "pinned":
            held.release(entry)
            await held.pin(adapters[0])
        clock.now += 3600
        with pytest.raises((Overloaded, InvalidRequest)):
            await held.load(adapters[1], protect_recent_seconds=60)
        assert [each.id for each in held.entries()] == [adapters[0]]

    asyncio.run(scenario())


def test_a_request_that_joins_a_protecting_load_is_served_like_any_other(
    tiny: Tiny, adapters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both hang on one load, which was begun to evict nobody; the one that needs it decides."""

    async def scenario() -> None:
        held = registry(tiny, SlowEngine(at_once=True), slots=1)
        await held.load(adapters[0])
        reading, read = threading.Event(), held._read

        def slowly(folder: Path) -> Checked:
            reading.wait(120)
            return read(folder)

        monkeypatch.setattr(held, "_read", slowly)
        protecting = asyncio.create_task(held.load(adapters[1], protect_recent_seconds=60))
        await asyncio.sleep(0)
        request = asyncio.create_task(held.acquire(adapters[1]))
        await asyncio.sleep(0)
        reading.set()
        entry, waited = await request
        assert (entry, entry.state) == (await protecting, "resident")
        assert waited is not None
        assert held.evictions == 1

    asyncio.run(scenario())
