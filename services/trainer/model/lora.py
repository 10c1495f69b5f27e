"""LoRA on a warm base: attached for one job, then detached without a trace.

Owns which weights are trained and in what dtype; the base's weights never change.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn

from shared.errors import JobFailed
from shared.jobs.spec import LoraSpec

Parameters = dict[str, nn.Parameter]


def lora_config(lora: LoraSpec) -> LoraConfig:
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        use_rslora=lora.use_rslora,
        bias="none",
    )


@contextmanager
def lora_attached(model: nn.Module, lora: LoraSpec, seed: int) -> Iterator[PeftModel]:
    """The base with fresh fp32 LoRA weights, B zero and A drawn from `seed`; the clean base again afterwards.

    All random generators of the process are seeded before the weights are drawn, so that earlier jobs of the worker
    have no influence.

    Raises:
        JobFailed: `invalid_target_modules`: the base has no linear layer of a requested name.
    """
    _check_targets(model, lora)
    set_seed(seed)
    peft_model = _attach(model, lora)
    try:
        for parameter in trainable(peft_model).values():
            # Half-precision LoRA breaks loss scaling and bit-exact resume, whatever the base is held in.
            assert parameter.dtype == torch.float32
        yield peft_model
    finally:
        _detach(peft_model)


@contextmanager
def lora_loaded(model: nn.Module, folder: Any) -> Iterator[PeftModel]:
    """The base with a saved adapter, loaded as any user of peft would; the clean base again afterwards."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        peft_model = PeftModel.from_pretrained(model, folder, torch_device=str(next(model.parameters()).device))
    try:
        yield peft_model
    finally:
        _detach(peft_model)


def trainable(model: nn.Module) -> Parameters:
    """The weights that are trained, by name, in a fixed order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; 4-bit weights count one by one, tied weights once."""
    trained, total = PeftModel.get_nb_trainable_parameters(model)
    return trained, total


def _attach(model: nn.Module, lora: LoraSpec) -> PeftModel:
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 under a name that goes away in v6.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return get_peft_model(model, lora_config(lora))


def _check_targets(model: nn.Module, lora: LoraSpec) -> None:
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unknown = sorted(set(lora.target_modules) - linear)
    if unknown:
        raise JobFailed(
            f"the base has no linear layers called {', '.join(unknown)}; it has {', '.join(sorted(linear))}",
            code="invalid_target_modules",
        )


def _detach(peft_model: PeftModel) -> None:
    # PeftModel marks the base so that save_pretrained writes an adapter; the marks must not reach the next job.
    base = peft_model.unload()
    base._hf_peft_config_loaded = False
    base.requires_grad_(False)
    base.eval()
