"""Composition root: builds base, engine and adapters. The one file that knows both torch and what the routes call."""

import os
import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch

from services.inference.adapters.registry import AdapterRegistry, Checked
from services.inference.adapters.residency import Residency
from services.inference.adapters.weights import read_adapter, refuse
from services.inference.engine.admission import Admission
from services.inference.engine.batch_engine import BatchEngine
from services.inference.engine.choose_runner import choose_runner, default_precision, precision_to_load
from services.inference.engine.grammar import Grammars
from services.inference.serving import ServedBase, Serving
from services.inference.settings import InferenceSettings
from shared.bases.base_model import LoadedBase, compute_dtype, load_base, prepare_base
from shared.bases.catalogue import Catalogue
from shared.bases.device import choose_device
from shared.datasets.templates import template_by_id
from shared.errors import InvalidRequest
from shared.storage.artifacts import ADAPTER_WEIGHTS, LocalArtifactStore


def build_serving(settings: InferenceSettings, store: LocalArtifactStore, catalogue: Catalogue) -> Serving:
    """Prepare and load the base, start the engine.

    Raises:
        NotFound: the catalogue has no such base.
        Unavailable, ArtifactCorrupt, TunesmithError: the base cannot be prepared, loaded or served.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    base = catalogue.get(settings.base) if settings.base else catalogue.bases[0]
    device = choose_device(settings.device)
    dtype = compute_dtype("auto", device)
    # Before the base is downloaded: a precision that cannot be served is refused at once.
    requested = settings.precision or default_precision(device.type)
    precision = precision_to_load(requested, device.type, "bf16" if dtype == torch.bfloat16 else "fp16")
    prepare_base(base, store)
    return assemble(load_base(base, store, precision, device, dtype), settings, store)


def assemble(loaded: LoadedBase, settings: InferenceSettings, store: LocalArtifactStore) -> Serving:
    """The service around a loaded base, which it takes over: the caller must not use the base any more."""
    chosen = choose_runner(
        loaded.model,
        loaded.precision,
        settings.precision or default_precision(loaded.device.type),
        loaded.tokenizer,
        rows=settings.slots,
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

    def read(folder: Path) -> Checked:
        return read_checked(folder, loaded, store, settings, modules, dtype)

    # Readers compute on one thread each: more would take the cores from the engine's threads.
    pool = ThreadPoolExecutor(2, "adapter-reader", initializer=torch.set_num_threads, initargs=(1,))
    residency = Residency(engine, budget=settings.adapter_bytes, slots=settings.adapter_slots)
    adapters = AdapterRegistry(store, engine, read, pool, residency)
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
    grammars = Grammars(loaded.tokenizer, runner.vocabulary)
    cuts = settings.beyond_context == "cut"
    return Serving(base, loaded.tokenizer, engine, admission, adapters, grammars, cuts_new_tokens=cuts)


def _leave() -> None:
    """Have this process answer what is open and end, for whoever started it to start it anew."""
    os.kill(os.getpid(), signal.SIGTERM)


def read_checked(
    folder: Path,
    loaded: LoadedBase,
    store: LocalArtifactStore,
    settings: InferenceSettings,
    modules: Mapping[str, tuple[int, int]],
    dtype: torch.dtype,
) -> Checked:
    """Verify an adapter folder, see that it belongs to this base, and read it.

    Raises:
        NotFound, ArtifactCorrupt: see `LocalArtifactStore.verify`.
        InvalidRequest: code `adapter_refused`, with the reason.
    """
    manifest = store.verify(folder, "adapter")
    if manifest.id != folder.name:
        raise refuse(f"its manifest is {manifest.id[:100]}'s")
    if (manifest.base, manifest.base_sha256) != (loaded.base.id, loaded.sha256):
        same = "other weights of it" if manifest.base == loaded.base.id else f"this server has {loaded.base.id}"
        raise refuse(f"it was trained on the base {manifest.base} ({same})")
    if ADAPTER_WEIGHTS not in manifest.files:
        raise refuse(f"it has no {ADAPTER_WEIGHTS}")
    if manifest.files[ADAPTER_WEIGHTS].size > settings.adapter_bytes:
        raise refuse(f"it is larger than this server's budget of {settings.adapter_bytes} bytes")
    try:
        template = template_by_id(manifest.template, loaded.tokenizer.chat) if manifest.template else None
    except InvalidRequest as error:
        raise refuse(error.message) from None
    weights = read_adapter(folder, modules, max_rank=settings.max_rank, dtype=dtype)
    return Checked(manifest, weights, template)
