"""Our engine at its `submit` boundary, in this process: batches, first tokens, and loads beside running streams."""

import asyncio
import json
import threading
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.serve_workload import Workload
from services.inference.adapters.registry import AdapterRegistry
from services.inference.build import assemble
from services.inference.engine.grammar import Grammars
from services.inference.engine.interface import (
    Cancelled,
    CompiledGrammar,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    GrammarText,
    Token,
)
from services.inference.precision import ServingPrecision
from services.inference.serving import Serving
from services.inference.settings import InferenceSettings

ROWS = 32
# Longer than any request here asks for.
_ITEM = {"type": "object", "properties": {"name": {"type": "string"}, "count": {"type": "integer"}}}
SCHEMA = {"type": "array", "items": _ITEM | {"required": ["name", "count"]}, "minItems": 1000}


@dataclass(eq=False)
class Recording:
    """The tokens of one request and when each arrived."""

    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Token):
            self.ids.append(event.id)
            self.times.append(time.perf_counter())
        elif isinstance(event, Finished | Failed | Cancelled):
            self.error = event.error if isinstance(event, Failed) else None
            self.over.set()

    def wait(self) -> "Recording":
        assert self.over.wait(300), "the engine is stuck"
        if self.error:
            raise self.error
        return self


class EngineBench:
    """One engine in one precision, with its adapter registry on an event loop of its own."""

    def __init__(self, work: Workload, precision: ServingPrecision) -> None:
        settings = InferenceSettings(
            precision=precision, slots=ROWS, context=1024, adapter_slots=20, queue_requests=1000, host="127.0.0.1"
        )
        self.serving: Serving = assemble(work.loaded, settings, work.store)
        self.precision = self.serving.base.precision
        self._work = work
        self._registry: AdapterRegistry = self.serving.adapters
        self._grammar: CompiledGrammar | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._uids = [self.load(adapter) for adapter in work.adapters[:16]]

    def close(self) -> None:
        self._call(self.serving.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    def load(self, adapter: str) -> str:
        """Hot-load an adapter from disk; returns its uid in the engine."""
        uid: str = self._call(self._registry.load(adapter)).uid
        return uid

    def unload(self, adapter: str) -> None:
        async def do() -> None:
            self._registry.unload(adapter)

        self._call(do())

    def submit(self, number: int, uid: str | None, tokens: int, grammar: CompiledGrammar | None = None) -> Recording:
        recording, prompt = Recording(), self._work.prompt(number)
        request = GenerationRequest(prompt, adapter=uid, max_new_tokens=tokens, ignore_eos=True, grammar=grammar)
        self.serving.engine.submit(request, recording)
        return recording

    def batch(self, rows: int, adapters: int, tokens: int | None = None) -> list[Recording]:
        """`rows` requests at once over so many adapters (0: the base); waits for their ends."""
        uids = [self._uids[row % adapters] if adapters else None for row in range(rows)]
        recordings = [self.submit(row, uid, tokens or self._work.tokens) for row, uid in enumerate(uids)]
        return [each.wait() for each in recordings]

    def batch_speed(self, rows: int, adapters: int) -> float:
        """Tokens per second of such a batch, prefill included."""
        started = time.perf_counter()
        self.batch(rows, adapters)
        return rows * self._work.tokens / (time.perf_counter() - started)

    def grammar_speed(self, rows: int, bound: int) -> float:
        """As `batch_speed` with one adapter, the first `bound` rows held to a JSON schema."""
        if self._grammar is None:
            grammars = Grammars(self._work.loaded.tokenizer, self._work.loaded.model.config.vocab_size)
            self._grammar = self._call(grammars.compiled(GrammarText("json_schema", json.dumps(SCHEMA))))
        tokens, started = self._work.tokens, time.perf_counter()
        held = [self._grammar if row < bound else None for row in range(rows)]
        for each in [self.submit(row, self._uids[0], tokens, grammar) for row, grammar in enumerate(held)]:
            assert len(each.wait().ids) == tokens, "the form has ended too early"
        return rows * tokens / (time.perf_counter() - started)

    def decode_speed(self, rows: int, adapters: int) -> float:
        """Tokens per second once all rows decode: from the last first token to the first last one."""
        recordings = self.batch(rows, adapters, self._work.tokens + 2 * rows)
        begin, end = max(each.times[0] for each in recordings), min(each.times[-1] for each in recordings)
        tokens = sum(sum(begin < moment <= end for moment in each.times) for each in recordings)
        return tokens / (end - begin)

    def first_token_ms(self, times: int) -> float:
        """Median time from `submit` to the first token on an idle engine."""
        waits = []
        for number in range(times):
            started = time.perf_counter()
            waits.append(self.submit(number, self._uids[0], 1).wait().times[0] - started)
        return median(waits) * 1e3

    def loads_beside_streams(self, spare: list[str], *, streams: int, seconds: float, pause: float) -> dict[str, Any]:
        """Hot loads and unloads while streams run: how long a load takes, and how the streams are delayed.

        Quiet and loaded stretches alternate on the same streams, so that both see the same lengths and neighbours.
        """
        requests = [
            GenerationRequest(self._work.prompt(row), adapter=self._uids[row % 8], max_new_tokens=900, ignore_eos=True)
            for row in range(streams)
        ]
        recordings = [Recording() for _ in requests]
        handles = [self.serving.engine.submit(*pair) for pair in zip(requests, recordings, strict=True)]
        for each in recordings:
            while not each.times:
                time.sleep(0.01)
        loads: list[float] = []
        stretches: list[tuple[float, float, bool]] = []
        for stretch in range(6):
            started, loading = time.perf_counter(), stretch % 2 == 1
            while time.perf_counter() - started < seconds / 6:
                if loading:
                    adapter = spare[len(loads) % len(spare)]
                    before = time.perf_counter()
                    self.load(adapter)
                    loads.append((time.perf_counter() - before) * 1e3)
                    self.unload(adapter)
                time.sleep(pause)
            stretches.append((started, time.perf_counter(), loading))
        gaps: dict[bool, list[float]] = {False: [], True: []}
        for each in recordings:
            for before, after in zip(each.times, each.times[1:], strict=False):
                for started, ended, loading in stretches:
                    if started <= before and after <= ended:
                        gaps[loading].append((after - before) * 1e3)
        for handle, each in zip(handles, recordings, strict=True):
            self.serving.engine.cancel(handle)
            each.wait()
        return {"loads": loads, "quiet": gaps[False], "during": gaps[True]}


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
