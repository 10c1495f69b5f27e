"""A tiny base with its engine, driven without HTTP: submit, wait, compare."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from services.inference.adapters.weights import read_adapter
from services.inference.engine.admission import Admission
from services.inference.engine.batch_engine import BatchEngine
from services.inference.engine.interface import Cancelled, Event, Failed, Finished, GenerationRequest, Started, Token
from services.inference.engine.llama import LlamaRunner
from services.inference.engine.packed import PackedPrecision
from services.inference.engine.runner import ModelRunner
from services.inference.engine.transformers_runner import TransformersRunner
from shared.bases.base_model import LoadedBase, load_base
from shared.bases.catalogue import Base
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.manifests import Manifest
from tests.services.inference.adapters_on_disk import Oracle, write_adapter


@dataclass
class Tiny:
    """The prepared tiny base, and adapters of it."""

    store: LocalArtifactStore
    base: Base
    manifest: Manifest
    model: Path
    oracle: Oracle

    def adapter(self, **kind: Any) -> str:
        return write_adapter(self.store, self.model, self.manifest, **kind)

    def load(self) -> LoadedBase:
        return load_base(self.base, self.store, "fp32", torch.device("cpu"))


@dataclass
class Heard:
    """A sink that remembers, and lets a test wait."""

    on_event: Callable[[Event], None] | None = None
    events: list[Event] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if self.on_event:
            self.on_event(event)
        if isinstance(event, Token):
            self.begun.set()
        if isinstance(event, Finished | Failed | Cancelled):
            assert not self.over.is_set(), "two last events"
            self.over.set()

    @property
    def tokens(self) -> list[Token]:
        return [event for event in self.events if isinstance(event, Token)]

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def last(self) -> Event:
        assert self.over.wait(60), "no last event"
        return self.events[-1]

    @property
    def started(self) -> Started:
        return next(event for event in self.events if isinstance(event, Started))


def alike(one: Any, other: Any) -> bool:
    """Whether two values of lists, dictionaries, dataclasses and numbers differ in the last digits of floats only."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-3)
    if is_dataclass(one) and type(one) is type(other):
        return all(alike(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and type(one) is type(other):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


class EngineUnderTest:
    """A real engine on the tiny base."""

    def __init__(
        self,
        tiny: Tiny,
        *,
        rows: int = 4,
        context: int = 256,
        chunk: int = 16,
        queue_requests: int = 1000,
        queue_tokens: int = 1_000_000,
        adapter_slots: int = 8,
        own: bool = True,
        precision: PackedPrecision = "plain",
    ) -> None:
        self.tiny = tiny
        loaded = tiny.load()
        self.tokenizer = loaded.tokenizer
        self.runner: ModelRunner = (
            LlamaRunner(loaded.model, precision=precision, rows=rows, context=context, adapter_slots=adapter_slots)
            if own
            else TransformersRunner(loaded.model, rows=rows, context=context, adapter_slots=adapter_slots)
        )
        self.admission = Admission(requests=queue_requests, tokens=queue_tokens)
        self.engine = BatchEngine(self.runner, loaded.tokenizer, self.admission, prefill_chunk=chunk)

    def load(self, adapter: str) -> None:
        folder = self.tiny.store.adapter(adapter)
        weights = read_adapter(folder, self.engine.lora_modules, max_rank=256)
        self.engine.load(adapter, self.engine.prepare(weights)).result(120)

    def prompt(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=True)

    def submit(self, prompt: list[int], **options: Any) -> Heard:
        heard = Heard()
        self.engine.submit(GenerationRequest(prompt, **options), heard)
        return heard

    def run(self, prompt: list[int], **options: Any) -> Heard:
        heard = self.submit(prompt, **options)
        assert isinstance(heard.last, Finished), heard.last
        return heard

    def wait_until_idle(self) -> None:
        """A last event is heard a moment before its row is free."""
        deadline = time.monotonic() + 120
        while self.engine.stats().running:
            assert time.monotonic() < deadline, "a row is not given back"
            time.sleep(0.005)
