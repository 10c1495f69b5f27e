"""Forward passes of a transformers model over the slot cache: a piece of one prompt, or one token for many rows.

Owns positions and masks. Knows no requests, no sampling and no text.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from services.inference.engine.cache import SlotCache
from services.inference.engine.lora import LoraStack
from services.inference.engine.runner import Piece
from shared.errors import TunesmithError

# Decoders whose every layer attends to all earlier tokens; others would need more than a mask.
SUPPORTED = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "olmo2", "phi3", "stablelm", "starcoder2"}
)


class TransformersRunner:
    """A model, its LoRA slots and its KV cache.

    Args:
        model: transformers' causal LM; its linear layers are replaced in place.
        rows: sequences held at once.
        context: tokens per sequence; not more than the model's own limit is used.

    Raises:
        TunesmithError: the architecture is not one of `SUPPORTED`, or has layers without full attention.
    """

    def __init__(self, model: Any, *, rows: int, context: int, adapter_slots: int) -> None:
        config = model.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if config.model_type not in SUPPORTED or kinds != {"full_attention"} or _slides(config):
            raise TunesmithError(f"the engine does not serve {config.model_type} models of layers {sorted(kinds)}")
        embedding: nn.Module = model.get_input_embeddings()
        weight = embedding.weight
        assert isinstance(weight, torch.Tensor)
        self.device, self.dtype = weight.device, weight.dtype
        self.rows = rows
        self.context = min(context, int(config.max_position_embeddings))
        self.vocabulary = int(config.vocab_size)
        self.lora = LoraStack(model, root="model.layers", slots=adapter_slots, dtype=self.dtype, device=self.device)
        self.cache = SlotCache(
            layers=config.num_hidden_layers,
            rows=rows,
            heads=config.num_key_value_heads,
            capacity=self.context,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=self.dtype,
            device=self.device,
        )
        self._model = model

    def prefill(
        self, row: int, ids: Sequence[int], start: int, slot: int, rank: int, *, all_logits: bool
    ) -> torch.Tensor:
        """Put prompt tokens into a row from position `start`.

        Returns:
            Logits, fp32: [len(ids), vocabulary] if `all_logits`, else [1, vocabulary] of the last token.
        """
        end = start + len(ids)
        positions = torch.arange(start, end, device=self.device)[None]
        self.lora.selection.set([slot], [rank], self.device)
        self.cache.window.set(row, positions, end)
        return self._forward(torch.tensor([ids], device=self.device), positions, end, 0 if all_logits else 1)[0]

    def prefill_together(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """See `ModelRunner.prefill_together`; one after another here."""
        return torch.cat([self.prefill(p.row, p.ids, p.start, p.slot, p.rank, all_logits=False) for p in pieces])

    def decode(
        self, first: int, ids: Sequence[int], positions: Sequence[int], slots: Sequence[int], ranks: Sequence[int]
    ) -> torch.Tensor:
        """One token for each of the rows `first, first + 1, …`, each at its own position and with its own adapter.

        Returns:
            Logits, fp32 [rows, vocabulary].
        """
        end = max(positions) + 1
        where = torch.tensor(positions, device=self.device)[:, None]
        self.lora.selection.set(slots, ranks, self.device)
        self.cache.window.set(first, where, end)
        return self._forward(torch.tensor(ids, device=self.device)[:, None], where, end, 1)[:, 0]

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, length: int, keep: int) -> torch.Tensor:
        # transformers uses a mask of four dimensions as it is.
        later = torch.arange(length, device=self.device) > positions[:, None, :, None]
        mask = torch.zeros(later.shape, dtype=self.dtype, device=self.device).masked_fill_(later, float("-inf"))
        logits: torch.Tensor = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        return logits.float()


def _slides(config: Any) -> bool:
    """Whether a sliding window is in force (Qwen2 names one and leaves it off)."""
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
