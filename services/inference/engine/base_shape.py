"""What is known of a prepared base without its weights: for an engine that leaves them to another process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn


def head_dim(config: Any) -> int:
    """Size of one attention head; `config` is transformers' configuration, which may leave it to be worked out."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True, slots=True)
class BaseShape:
    """A base's measures.

    Attributes:
        positions: most tokens of one sequence.
        vocabulary: how many scores it gives.
        lora_modules: path of every layer an adapter may target → (in, out) features.
    """

    positions: int
    vocabulary: int
    lora_modules: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Read from a prepared base's folder; nothing is allocated."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        linear = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
        modules = {
            name: (layer.in_features, layer.out_features)
            for name, layer in linear.items()
            if name.startswith("model.layers.")
        }
        return cls(int(config.max_position_embeddings), int(config.vocab_size), modules)
