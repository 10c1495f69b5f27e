"""Reads a LoRA adapter from disk and refuses everything that would not act exactly as it was trained.

An adapter that silently does nothing is the worst fault here: every tensor must belong to a layer of the served base,
every layer that the configuration names must have its pair, and what the engine's LoRA operation does not cover is
refused with a reason. Owns the file format (peft's); `residency` decides what stays in memory.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from services.inference.engine.lora import LoraWeights
from shared.errors import InvalidRequest
from shared.storage.artifacts import ADAPTER_CONFIG, ADAPTER_WEIGHTS

_PREFIX = "base_model.model."
_DTYPES = frozenset({"F32", "F16", "BF16"})
# Keys of adapter_config.json that do not change what the weights compute. Any other must be unset or off.
_DESCRIPTION = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
_READ_HERE = {"r", "lora_alpha", "target_modules", "bias", "use_rslora"}
_TRAINING_ONLY = {"inference_mode", "lora_dropout", "init_lora_weights", "qalora_group_size", "megatron_core"}
_HARMLESS = _DESCRIPTION | _READ_HERE | _TRAINING_ONLY | {"loftq_config", "runtime_config"}


def refuse(reason: str) -> InvalidRequest:
    """The error for an adapter that cannot be served. The adapter is at fault, not the engine."""
    return InvalidRequest(f"adapter refused: {reason}", code="adapter_refused")


def read_adapter(
    folder: Path, modules: Mapping[str, tuple[int, int]], *, max_rank: int, dtype: torch.dtype = torch.float32
) -> LoraWeights:
    """Read and check an adapter.

    Args:
        folder: a verified adapter folder.
        modules: path of every layer an adapter may target → (in, out) features.
        dtype: what the weights are returned in.

    Raises:
        InvalidRequest: code `adapter_refused`, with the reason.
    """
    config = _read_config(folder / ADAPTER_CONFIG)
    rank, scaling = _rank_and_scaling(config, max_rank)
    targets = _targets(config, modules)
    tensors = _read_tensors(folder / ADAPTER_WEIGHTS)
    expected = {f"{_PREFIX}{path}.lora_{side}.weight": path for path in targets for side in "AB"}
    if missing := sorted(expected.keys() - tensors.keys()):
        raise refuse(f"{len(missing)} tensors of its target layers are missing, such as {missing[0]}")
    if strange := sorted(tensors.keys() - expected.keys()):
        raise refuse(f"{len(strange)} tensors belong to no target layer of this base, such as {strange[0][:200]}")
    pairs = {}
    for path in targets:
        fan_in, fan_out = modules[path]
        a = _checked(tensors, path, "A", (rank, fan_in))
        b = _checked(tensors, path, "B", (fan_out, rank))
        scaled = (b.float() * scaling).to(dtype)
        if not torch.isfinite(scaled).all():
            raise refuse(
                f"{path}.lora_B overflows {str(dtype).removeprefix('torch.')} once it is scaled by {scaling:g}"
            )
        pairs[path] = (a.to(dtype), scaled)
    return LoraWeights(rank=rank, pairs=pairs)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise refuse(f"{ADAPTER_CONFIG} is missing or not JSON") from None
    if not isinstance(config, dict):
        raise refuse(f"{ADAPTER_CONFIG} is not an object")
    if config.get("peft_type") != "LORA":
        raise refuse(f"peft_type is {str(config.get('peft_type'))[:40]!r}, only LORA is served")
    if config.get("bias", "none") != "none":
        raise refuse("trained biases are not supported")
    if unsupported := sorted(key for key, value in config.items() if value and key not in _HARMLESS):
        raise refuse(f"{', '.join(unsupported)[:200]} not supported")
    return config


def _rank_and_scaling(config: dict[str, Any], max_rank: int) -> tuple[int, float]:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise refuse("r must be a positive integer")
    if rank > max_rank:
        raise refuse(f"rank {rank} exceeds this server's limit of {max_rank}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise refuse("lora_alpha must be a number")
    try:
        alpha = float(alpha)
    except OverflowError:
        alpha = math.inf
    if not math.isfinite(alpha):
        raise refuse("lora_alpha must be a finite number")
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _targets(config: dict[str, Any], modules: Mapping[str, tuple[int, int]]) -> list[str]:
    """Paths of the layers that the configuration targets, by peft's rule: the path's last part, or its end."""
    names = config.get("target_modules")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise refuse("target_modules must be a list of module names")
    ends: dict[str, list[str]] = {}
    for path in modules:
        parts = path.split(".")
        for start in range(len(parts)):
            ends.setdefault(".".join(parts[start:]), []).append(path)
    targets: set[str] = set()
    for name in names:
        hits = ends.get(name)
        if not hits:
            raise refuse(f"target module {name[:100]!r} is no linear layer of this base's decoder")
        targets.update(hits)
    return sorted(targets)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {}
            for key in file.keys():  # noqa: SIM118 -- not a dict
                dtype = file.get_slice(key).get_dtype()
                if dtype not in _DTYPES:
                    raise refuse(f"{key[:200]} has dtype {dtype}")
                tensors[key] = file.get_tensor(key)
            return tensors
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise refuse(f"{ADAPTER_WEIGHTS} cannot be read: {str(error)[:200]}") from None


def _checked(tensors: dict[str, torch.Tensor], path: str, side: str, shape: tuple[int, int]) -> torch.Tensor:
    tensor = tensors[f"{_PREFIX}{path}.lora_{side}.weight"]
    if tuple(tensor.shape) != shape:
        raise refuse(f"{path}.lora_{side} has shape {list(tensor.shape)}, expected {list(shape)}")
    if not torch.isfinite(tensor).all():
        raise refuse(f"{path}.lora_{side} holds NaN or infinity")
    return tensor
