"""The device and dtype that a job computes in, with autocast and loss scaling from accelerate."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from shared.bases.base_model import compute_dtype
from shared.errors import JobFailed
from shared.jobs.spec import JobSpec

_MIXED = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, slots=True)
class Precision:
    """How matrix products run. LoRA weights, gradients and Adam's moments are always fp32.

    Attributes:
        dtype: of the matrix products; parts that need it stay fp32 under autocast.
        autocast: a fresh context for each forward pass.
        scaler: keeps fp16 gradients from underflowing; None unless `dtype` is fp16.
    """

    device: torch.device
    dtype: torch.dtype
    autocast: Callable[[], AbstractContextManager[Any]]
    scaler: torch.amp.GradScaler | None


def choose_precision(spec: JobSpec, device: torch.device) -> Precision:
    """The precision of a job on a device.

    Raises:
        JobFailed: fp16 products on a CPU, which has no use for them; bf16 products on a GPU that only emulates them.
    """
    dtype = compute_dtype(spec.compute_dtype, device, spec.base_precision)
    if dtype == torch.float16 and device.type == "cpu":
        raise JobFailed(
            "compute_dtype fp16 needs a GPU; use auto, which trains on fp16 weights too",
            code="unsupported_precision",
        )
    if dtype == torch.bfloat16 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise JobFailed(
            "compute_dtype bf16 needs a GPU of compute capability 8.0 or newer; use auto or fp16",
            code="unsupported_precision",
        )
    # accelerate keeps one precision per process; a worker takes jobs of several.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=_MIXED[dtype])
    return Precision(device, dtype, accelerator.autocast, accelerator.scaler)
