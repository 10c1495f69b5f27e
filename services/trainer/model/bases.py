"""The frozen base model that a worker trains on, kept in memory (warm) from one job to the next.

Owns what is done to a base once, before any LoRA is attached.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import prepare_model_for_kbit_training

from services.trainer.model.attention import attend_per_sample
from services.trainer.model.dequantised import multiply_dequantised
from services.trainer.model.fingerprint import fingerprint
from services.trainer.model.llama import can_fuse, fuse
from services.trainer.model.malloc import limit_kernel_cache, release_free_memory
from services.trainer.model.mixed_precision import compute_in_fp32
from shared.bases.base_model import LoadedBase, load_base, memory_megabytes, prepare_base
from shared.bases.catalogue import Base, Catalogue
from shared.datasets.tokens import Tokenizer
from shared.errors import NotFound, Unavailable
from shared.jobs.spec import JobSpec
from shared.storage.artifacts import LocalArtifactStore


@dataclass(frozen=True, slots=True)
class TrainableBase:
    """A base ready to have LoRA attached.

    Attributes:
        fingerprint: hash of every weight as it lay in memory once it was loaded.
        dtype: of its matrix products.
    """

    loaded: LoadedBase
    fingerprint: str
    dtype: torch.dtype


class UntrainedLosses:
    """A warm base's own losses on held-out rows: every job whose LoRA starts at zero starts from the same loss."""

    def __init__(self) -> None:
        self._losses: dict[tuple[str, int], tuple[float, float]] = {}

    def get(self, rows_key: str, token_budget: int) -> tuple[float, float] | None:
        """(loss in nats, seconds it took) if it is known."""
        return self._losses.get((rows_key, token_budget))

    def add(self, rows_key: str, token_budget: int, loss: float, seconds: float) -> None:
        """Remember a loss on the rows of that key, computed in micro-batches of that size."""
        self._losses[rows_key, token_budget] = loss, seconds


class WarmBases:
    """Prepares, loads and keeps one base at a time: a second one beside it may not fit.

    Args:
        reload: reads the catalogue again, before a job's base is said to be unknown.

    Attributes:
        untrained_losses: of the base that is warm.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        store: LocalArtifactStore,
        device: torch.device,
        reload: Callable[[], Catalogue] | None = None,
    ) -> None:
        self.device = device
        self._reload = reload
        self._catalogue = catalogue
        self._store = store
        self._warm: TrainableBase | None = None
        self.untrained_losses = UntrainedLosses()
        limit_kernel_cache()

    def tokenizer(self, spec: JobSpec) -> Tokenizer:
        """The base's tokenizer, without loading the model; prepares the base on this installation's first use.

        Raises:
            Unavailable: `base_unavailable`: the catalogue here does not hold the base the job was created for; or the
                hub cannot be reached or does not give it.
        """
        base = self._base(spec)
        if self._warm is not None and self._warm.loaded.base == base:
            return self._warm.loaded.tokenizer
        prepare_base(base, self._store)
        return Tokenizer(self._store.base(base.id))

    def load(self, spec: JobSpec, dtype: torch.dtype) -> tuple[TrainableBase, float | None]:
        """The base in the job's precision, and how many seconds loading took; None if it was warm.

        Raises:
            Unavailable: see `tokenizer`.
            ArtifactCorrupt: the prepared folder does not verify.
        """
        base = self._base(spec)
        warm = self._warm
        if warm is not None and (warm.loaded.base, warm.loaded.precision, warm.dtype) == (
            base,
            spec.base_precision,
            dtype,
        ):
            return warm, None
        self.discard()
        started = time.monotonic()
        loaded = load_base(base, self._store, spec.base_precision, self.device, dtype)
        make_trainable(loaded.model, quantized=loaded.quantized_layers > 0, dtype=dtype)
        loaded.megabytes = memory_megabytes(loaded.model)
        release_free_memory()
        self._warm = TrainableBase(loaded, fingerprint(loaded.model), dtype)
        return self._warm, time.monotonic() - started

    def discard(self) -> None:
        """Forget the warm base, so that the next job loads it afresh."""
        self._warm = None
        self.untrained_losses = UntrainedLosses()
        self.release_memory()

    def release_memory(self) -> None:
        """Return the memory that a job has freed, to the system and to other processes on the GPU."""
        release_free_memory()
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _base(self, spec: JobSpec) -> Base:
        try:
            return _in_catalogue(self._catalogue, spec)
        except Unavailable:
            if self._reload is None:
                raise
        # It may have been added since.
        self._catalogue = self._reload()
        return _in_catalogue(self._catalogue, spec)


def _in_catalogue(catalogue: Catalogue, spec: JobSpec) -> Base:
    try:
        base = catalogue.get(spec.base)
    except NotFound as error:
        raise Unavailable(f"its catalogue has no base {spec.base}", code="base_unavailable") from error
    if base.revision != spec.base_revision:
        raise Unavailable(
            f"its catalogue has {base.id} at revision {base.revision}, the job was created for {spec.base_revision}: "
            "give all workers one catalogue, or create a new job",
            code="base_unavailable",
        )
    return base


def make_trainable(model: Any, *, quantized: bool, dtype: torch.dtype) -> None:
    """Prepare a loaded base, in place, for forward passes whose products run in `dtype` and for LoRA's gradients."""
    if quantized:
        # Once, and before any LoRA: it freezes everything, later also the adapter (huggingface/trl#3926).
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if model.device.type == "cuda":
            multiply_dequantised(model)
    elif dtype == torch.float32 or can_fuse(model, dtype) or model.device.type == "cpu":
        compute_in_fp32(model)
    attend_per_sample(model)
    fuse(model, dtype)
