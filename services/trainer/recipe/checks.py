"""Checks of a finished run, made before its adapter is published."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from services.trainer.model.bases import TrainableBase
from services.trainer.model.fingerprint import fingerprint
from services.trainer.model.forward import Packed, supervised_logits, training_forward
from services.trainer.model.lora import lora_loaded, trainable
from services.trainer.model.precision import Precision
from shared.errors import JobFailed


def check_trained(model: PeftModel) -> None:
    """Every LoRA B, zero at the start, has been moved.

    Raises:
        JobFailed: `adapter_not_trained`, or `non_finite_loss` if a LoRA weight is not finite.
    """
    matrices = {name: p for name, p in trainable(model).items() if ".lora_B." in name}
    still = [name for name, parameter in matrices.items() if not parameter.detach().any()]
    if still:
        raise JobFailed(
            f"{len(still)} of {len(matrices)} LoRA layers were not trained ({still[0]}); check target_modules and the "
            "learning rate, and compute_dtype if every step overflowed",
            code="adapter_not_trained",
        )
    if not all(bool(p.detach().isfinite().all()) for p in trainable(model).values()):
        raise JobFailed("the adapter holds values that are not finite; lower the learning rate", code="non_finite_loss")


def check_base_unchanged(base: TrainableBase) -> None:
    """The warm base is bit for bit what was loaded.

    Raises:
        JobFailed: `base_changed`; the base must not be used again.
    """
    if fingerprint(base.loaded.model) != base.fingerprint:
        raise JobFailed("the base model's weights changed during training; its adapter is void", code="base_changed")


def sample_logits(model: Any, packed: Packed, precision: Precision) -> Tensor:
    """Logits of one pack by the training forward without dropout."""
    with torch.no_grad(), training_forward(model, dropout=False), precision.autocast():
        return supervised_logits(model, packed)


def check_reload(base: TrainableBase, folder: Path, packed: Packed, expected: Tensor, precision: Precision) -> None:
    """The written adapter, loaded by plain peft on the same base, computes what the trained one did, bit for bit.

    Raises:
        JobFailed: `adapter_differs`; some key or value was lost on the way to disk.
    """
    with lora_loaded(base.loaded.model, folder) as model:
        actual = sample_logits(model, packed, precision)
    if not torch.equal(actual, expected):
        raise JobFailed("the saved adapter does not compute what the trained one did", code="adapter_differs")
