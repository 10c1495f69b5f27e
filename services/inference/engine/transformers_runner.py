"""Forward passes of a transformers model over the slot cache: a piece of one prompt, or one token for many rows.

Owns positions and masks. Knows no requests, no sampling and no text.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from services.inference.engine.base_shape import head_dim
from services.inference.engine.cache import SlotCache
from services.inference.engine.fused_lora import FusedLora
from services.inference.engine.lora_linear import Chosen, linear_products, put_lora_into
from services.inference.engine.runner import Piece
from shared.errors import TunesmithError

# Decoders whose layers attend to all earlier tokens, or to those within a sliding window.
SUPPORTED = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2", "stablelm", "starcoder2"),
        *("gemma", "gemma2", "gemma3_text", "phi", "phi3"),
    }
)
FULL, SLIDING = "full_attention", "sliding_attention"
# These take a mask for each kind of layer; the others one for all layers.
_MASK_BY_KIND = frozenset({"qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text"})


class TransformersRunner:
    """A model, its LoRA slots and its KV cache.

    Args:
        model: transformers' causal LM; its linear layers are replaced in place.
        rows: sequences held at once.
        context: tokens per sequence; not more than the model's own limit is used.

    Raises:
        TunesmithError: the architecture is not one of `SUPPORTED`, or has layers of another kind.
    """

    def __init__(self, model: Any, *, rows: int, context: int, adapter_slots: int) -> None:
        config = model.config
        window = _sliding_window(config)
        kinds = set(getattr(config, "layer_types", None) or [FULL if window is None else SLIDING])
        if config.model_type not in SUPPORTED or not kinds <= {FULL, SLIDING}:
            raise TunesmithError(f"the engine does not serve {config.model_type} models of layers {sorted(kinds)}")
        # Tokens that each kind of layer sees, itself included; None for all.
        self._windows = {kind: window if kind == SLIDING else None for kind in kinds}
        self._mask_by_kind = config.model_type in _MASK_BY_KIND
        assert self._mask_by_kind or len(kinds) == 1
        embedding: nn.Module = model.get_input_embeddings()
        weight = embedding.weight
        assert isinstance(weight, torch.Tensor)
        self.device, self.dtype = weight.device, weight.dtype
        self.rows = rows
        self.context = min(context, int(config.max_position_embeddings))
        self.vocabulary = int(config.vocab_size)
        self._chosen = Chosen()
        products = linear_products(model)
        put_lora_into(model, self._chosen)
        self.lora = FusedLora(products, slots=adapter_slots, rows=rows, dtype=self.dtype, device=self.device)
        self.cache = SlotCache(
            layers=config.num_hidden_layers,
            rows=rows,
            heads=config.num_key_value_heads,
            capacity=self.context,
            head_dim=head_dim(config),
            dtype=self.dtype,
            device=self.device,
        )
        self._model = model

    def prefill(self, row: int, ids: Sequence[int], start: int, slot: int, *, all_logits: bool) -> torch.Tensor:
        """Put prompt tokens into a row from position `start`.

        Returns:
            Logits, fp32: [len(ids), vocabulary] if `all_logits`, else [1, vocabulary] of the last token.
        """
        end = start + len(ids)
        positions = torch.arange(start, end, device=self.device)[None]
        self._chosen.deltas = self.lora.choose([slot])
        self.cache.window.set(row, positions, end)
        return self._forward(torch.tensor([ids], device=self.device), positions, end, 0 if all_logits else 1)[0]

    def prefill_together(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """See `ModelRunner.prefill_together`; one after another here."""
        return torch.cat([self.prefill(p.row, p.ids, p.start, p.slot, all_logits=False) for p in pieces])

    def decode(self, first: int, ids: Sequence[int], positions: Sequence[int], slots: Sequence[int]) -> torch.Tensor:
        """One token for each of the rows `first, first + 1, …`, each at its own position and with its own adapter.

        Returns:
            Logits, fp32 [rows, vocabulary].
        """
        end = max(positions) + 1
        where = torch.tensor(positions, device=self.device)[:, None]
        self._chosen.deltas = self.lora.choose(slots)
        self.cache.window.set(first, where, end)
        return self._forward(torch.tensor(ids, device=self.device)[:, None], where, end, 1)[:, 0]

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, length: int, keep: int) -> torch.Tensor:
        masks = {kind: self._mask(positions, length, window) for kind, window in self._windows.items()}
        logits: torch.Tensor = self._model(
            input_ids=ids,
            attention_mask=masks if self._mask_by_kind else next(iter(masks.values())),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        return logits.float()

    def _mask(self, positions: torch.Tensor, length: int, window: int | None) -> torch.Tensor:
        """What to add to the scores of positions [rows, tokens] over `length` keys; transformers uses it as it is."""
        keys, queries = torch.arange(length, device=self.device), positions[:, None, :, None]
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        return torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, float("-inf"))


def _sliding_window(config: Any) -> int | None:
    """How many tokens layers that slide see; None if none does (Qwen2 names a window and leaves it off)."""
    window: int | None = getattr(config, "sliding_window", None)
    return window if getattr(config, "use_sliding_window", True) else None
