"""Composition root: builds base, engine and adapters. The one file that knows both torch and what the routes call."""

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch

from services.inference.adapters.registry import AdapterRegistry, Checked
from services.inference.adapters.residency import Residency
from services.inference.adapters.verified import verified
from services.inference.adapters.weights import read_adapter
from services.inference.engine.admission import Admission
from services.inference.engine.base_shape import BaseShape
from services.inference.engine.batch_engine import BatchEngine
from services.inference.engine.choose_runner import choose_runner, default_precision, precision_to_load
from services.inference.engine.grammar import Grammars
from services.inference.engine.interface import Engine
from services.inference.engine.rows import default_rows
from services.inference.engine.vllm_engine import AdapterFolder, VllmEngine
from services.inference.precision import VLLM_PRECISIONS
from services.inference.serving import ServedBase, Serving
from services.inference.settings import VLLM_SLOTS, InferenceSettings
from shared.bases.base_model import LoadedBase, compute_dtype, load_base, prepare_base
from shared.bases.catalogue import Base, Catalogue
from shared.bases.device import choose_device, take_share
from shared.datasets.tokens import Tokenizer
from shared.storage.artifacts import LocalArtifactStore


def build_serving(settings: InferenceSettings, store: LocalArtifactStore, catalogue: Catalogue) -> Serving:
    """Prepare the base, load it or leave that to vLLM, start the engine.

    Raises:
        NotFound: the catalogue has no such base.
        Unavailable, ArtifactCorrupt, TunesmithError: the base cannot be prepared, loaded or served.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    base = catalogue.get(settings.base) if settings.base else catalogue.bases[0]
    if settings.engine == "vllm":
        prepare_base(base, store)
        return beside_vllm(base, settings, store)
    device = choose_device(settings.device)
    take_share(device, settings.gpu_share)
    dtype = compute_dtype("auto", device)
    # Before the base is downloaded: a precision that cannot be served is refused at once.
    requested = settings.precision or default_precision(device.type)
    precision = precision_to_load(requested, device.type, "bf16" if dtype == torch.bfloat16 else "fp16")
    prepare_base(base, store)
    return assemble(load_base(base, store, precision, device, dtype), settings, store)


def assemble(loaded: LoadedBase, settings: InferenceSettings, store: LocalArtifactStore) -> Serving:
    """The service around a loaded base, which it takes over: the caller must not use the base any more."""
    slots = settings.slots or default_rows(
        loaded.model, settings.context, loaded.model.get_input_embeddings().weight.dtype, loaded.device
    )
    chosen = choose_runner(
        loaded.model,
        loaded.precision,
        settings.precision or default_precision(loaded.device.type),
        loaded.tokenizer,
        rows=slots,
        context=settings.context,
        adapter_slots=settings.adapter_slots,
    )
    runner = chosen.runner
    if chosen.backend == "llama":
        # It holds weights of its own; the model's would lie beside them unused.
        loaded = replace(loaded, model=None)
    admission = Admission(requests=settings.queue_requests, tokens=settings.queue_tokens)
    chunk = settings.prefill_chunk or (128 if loaded.device.type == "cpu" else 1024)
    engine = BatchEngine(runner, loaded.tokenizer, admission, prefill_chunk=chunk, on_device_lost=_leave)
    modules, dtype = engine.lora_modules, runner.dtype

    base = ServedBase(
        id=loaded.base.id,
        aliases=loaded.base.aliases,
        revision=loaded.base.revision,
        sha256=loaded.sha256,
        precision=chosen.precision,
        runner=chosen.backend,
        measured=tuple(asdict(each) for each in chosen.measured),
        dtype=str(dtype).removeprefix("torch."),
        device=loaded.device.type,
    )

    def read(folder: Path) -> Checked:
        manifest, template = verified(folder, base, loaded.tokenizer, store, settings.adapter_bytes)
        weights = read_adapter(folder, modules, max_rank=settings.largest_rank, dtype=dtype)
        return Checked(manifest, engine.prepare(weights), template)

    return served(base, loaded.tokenizer, engine, admission, read, runner.vocabulary, slots, settings, store)


def beside_vllm(base: Base, settings: InferenceSettings, store: LocalArtifactStore) -> Serving:
    """The service beside a vLLM server, which holds the prepared base; the server may come up later."""
    folder = store.base(base.id)
    manifest, tokenizer, shape = store.verify(folder, "base"), Tokenizer(folder), BaseShape.of(folder)
    precision = settings.precision if settings.precision in VLLM_PRECISIONS else VLLM_PRECISIONS[0]
    dtype = compute_dtype(precision, torch.device("cpu"))
    slots = settings.slots or VLLM_SLOTS
    admission = Admission(requests=settings.queue_requests, tokens=settings.queue_tokens)
    engine = VllmEngine(
        settings.vllm_url,
        base.id,
        tokenizer,
        admission,
        rows=slots,
        context=min(settings.context, shape.positions),
        vocabulary=shape.vocabulary,
    )
    served_base = ServedBase(
        id=base.id,
        aliases=base.aliases,
        revision=base.revision,
        sha256=manifest.base_sha256,
        precision=precision,
        runner="vllm",
        dtype=str(dtype).removeprefix("torch."),
        device=settings.device if settings.device != "auto" else choose_device().type,
    )

    def read(adapter: Path) -> Checked:
        manifest, template = verified(adapter, served_base, tokenizer, store, settings.adapter_bytes)
        weights = read_adapter(adapter, shape.lora_modules, max_rank=settings.largest_rank, dtype=dtype)
        return Checked(manifest, AdapterFolder(adapter, weights.rank, weights.nbytes), template)

    return served(served_base, tokenizer, engine, admission, read, shape.vocabulary, slots, settings, store)


def served(
    base: ServedBase,
    tokenizer: Tokenizer,
    engine: Engine,
    admission: Admission,
    read: Callable[[Path], Checked],
    vocabulary: int,
    slots: int,
    settings: InferenceSettings,
    store: LocalArtifactStore,
) -> Serving:
    """The service around an engine."""
    # Readers compute on one thread each: more would take the cores from the engine's threads.
    pool = ThreadPoolExecutor(2, "adapter-reader", initializer=torch.set_num_threads, initargs=(1,))
    residency = Residency(engine, budget=settings.adapter_bytes, slots=settings.adapter_slots)
    adapters = AdapterRegistry(store, engine, read, pool, residency)
    cuts = settings.beyond_context == "cut"
    grammars = Grammars(tokenizer, vocabulary)
    return Serving(base, tokenizer, engine, admission, adapters, grammars, slots=slots, cuts_new_tokens=cuts)


def _leave() -> None:
    """Have this process answer what is open and end, for whoever started it to start it anew."""
    os.kill(os.getpid(), signal.SIGTERM)
