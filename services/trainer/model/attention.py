"""Causal attention over packed samples, one sample at a time, instead of one block-diagonal mask over all.

The mask costs time and memory by the square of the packed length; here each sample pays for its own length only.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import AttentionInterface

NAME = "per_sample_causal"


def per_sample_causal(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sample_lengths: list[int],
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of packed samples, as transformers' attention interface calls it.

    Args:
        query: [1, heads, tokens, head dimension]; key and value with their own number of heads.
        sample_lengths: tokens of each sample, in packed order.

    Returns:
        [1, tokens, heads, head dimension], and no weights.
    """
    grouped = query.shape[1] != key.shape[1]
    parts = zip(*(torch.split(tensor, sample_lengths, dim=2) for tensor in (query, key, value)), strict=True)
    attended = [
        functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
        for q, k, v in parts
    ]
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, per_sample_causal)


def attend_per_sample(model: Any) -> None:
    """Switch a model to per-sample attention where that is known to be the same function, and faster.

    Other architectures may restrict attention further (sliding windows, soft caps) and keep transformers' own mask. So
    do GPUs, where many small kernels cost more than one mask.
    """
    if model.config.model_type == "llama" and model.device.type == "cpu":
        model.set_attn_implementation(NAME)


def attends_per_sample(model: Any) -> bool:
    return bool(model.config._attn_implementation == NAME)
