"""How many sequences are generated at once where nobody said. Knows a base's measures and free memory, no tensors."""

from typing import Any

import torch

from services.inference.engine.base_shape import head_dim
from services.inference.engine.choose_runner import products_of
from services.inference.engine.fused_lora import copied_bytes
from shared.bases.device import free_gpu_bytes

CPU_ROWS = 16
# Of a GPU: 64 rows took as long as 16 there, and each more costs the engine's thread some 20 us a step.
MOST_GPU_ROWS = 64
# What adapters usually have; each row keeps a copy of its adapter, which grows with the largest rank loaded.
USUAL_RANK = 16


def default_rows(model: Any, context: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows for a base that has just been loaded: 16 on a CPU, on a GPU what its free memory has room for.

    Args:
        model: transformers' causal LM.
        context: most tokens of a row.
        dtype: of keys, values and adapters.
    """
    if device.type != "cuda":
        return CPU_ROWS
    copies = copied_bytes(products_of(model), USUAL_RANK, dtype)
    return rows_that_fit(free_gpu_bytes(device), row_bytes(model.config, context, dtype) + copies)


def row_bytes(config: Any, context: int, dtype: torch.dtype) -> int:
    """Bytes of one row's keys and values, all layers and positions."""
    positions = min(context, int(config.max_position_embeddings))
    keys = config.num_hidden_layers * config.num_key_value_heads * head_dim(config) * positions
    return int(2 * keys * dtype.itemsize)


def rows_that_fit(free_bytes: int, bytes_of_row: int) -> int:
    """From 1 to 64 rows in half of what is free; the other half is for adapters, activations and a trainer's job."""
    return max(1, min(MOST_GPU_ROWS, free_bytes // 2 // bytes_of_row))
