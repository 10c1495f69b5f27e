"""Forward passes of Llama-family decoders on plain tensors: q, k, v fused, gate and up fused, weights packed.

A third of the time of transformers' own forward goes into Python and framework overhead when a few rows decode one
token each. This one makes few calls per layer and none through modules; its numbers are transformers' up to rounding.
Owns positions, masks and the order of operations. Knows no requests, no sampling and no text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from services.inference.engine.fused_lora import FusedLora, FusedStack, Part, add_delta
from services.inference.engine.key_values import KeyValues
from services.inference.engine.packed import Embedding, Linear, PackedPrecision, pack

FAMILY = frozenset({"llama", "mistral", "qwen2", "qwen3"})
# Rotary embeddings whose angles do not depend on how long the sequence has become.
_FIXED_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
# The fused products of a layer, in the order the forward pass needs them.
_GROUPS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: torch.Tensor
    epsilon: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: _Norm
    qkv: Linear
    query_norm: _Norm | None
    key_norm: _Norm | None
    out: Linear
    mlp_norm: _Norm
    gate_up: Linear
    down: Linear


def in_family(model: Any) -> bool:
    """Whether `LlamaRunner` computes what this transformers model computes."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    plain = all(type(module) is torch.nn.Linear for path, module in model.named_modules() if path.endswith("_proj"))
    return bool(
        config.model_type in FAMILY
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in _FIXED_ROPE
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and (getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True))
        and plain
    )


class LlamaRunner:
    """A `ModelRunner` of its own weights; see `in_family` for what it takes.

    Args:
        model: transformers' causal LM, plain or bf16/fp16; read once, not kept.
        precision: how the linear layers are held.
        rows: sequences held at once.
        context: tokens per sequence; not more than the model's own limit is used.
    """

    def __init__(self, model: Any, *, precision: PackedPrecision, rows: int, context: int, adapter_slots: int) -> None:
        config, decoder = model.config, model.model
        weight = decoder.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.rows = rows
        self.context = min(context, int(config.max_position_embeddings))
        self.vocabulary = int(config.vocab_size)
        self._heads, self._groups = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._inner = config.intermediate_size
        self._embedding = Embedding(weight, precision)
        self._layers = [_read_layer(layer, precision) for layer in decoder.layers]
        self._norm = _norm(decoder.norm)
        self._head = pack([model.lm_head], precision)
        self._cos, self._sin = self._rotations(decoder.rotary_emb)
        self.lora = FusedLora(
            _stacks(decoder.layers, adapter_slots, rows),
            slots=adapter_slots,
            rows=rows,
            dtype=self.dtype,
            device=self.device,
        )
        self.cache = KeyValues(
            layers=len(self._layers),
            rows=rows,
            heads=self._groups,
            capacity=self.context,
            head_dim=self._head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    def prefill(
        self, row: int, ids: Sequence[int], start: int, slot: int, rank: int, *, all_logits: bool
    ) -> torch.Tensor:
        """See `ModelRunner.prefill`."""
        positions = torch.arange(start, start + len(ids), device=self.device)
        hidden = self._forward(row, 1, ids, positions, start + len(ids), [slot])
        return self._logits(hidden if all_logits else hidden[-1:])

    def decode(
        self, first: int, ids: Sequence[int], positions: Sequence[int], slots: Sequence[int], ranks: Sequence[int]
    ) -> torch.Tensor:
        """See `ModelRunner.decode`."""
        where = torch.tensor(positions, device=self.device)
        return self._logits(self._forward(first, len(ids), ids, where, max(positions) + 1, slots))

    def _forward(
        self, first: int, rows: int, ids: Sequence[int], positions: torch.Tensor, length: int, slots: Sequence[int]
    ) -> torch.Tensor:
        """Hidden states [rows x new, hidden] of `new` tokens for each of the rows, which are row after row in `ids`."""
        new, repeat = len(ids) // rows, self._heads // self._groups
        cached = slice(first, first + rows)
        row_index = torch.arange(first, first + rows, device=self.device).repeat_interleave(new)
        cos, sin = self._cos[positions], self._sin[positions]
        # [rows, 1, repeat x new, length]: the query heads of a group are further queries of one key head.
        allowed = torch.arange(length, device=self.device) <= positions[:, None]
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device).masked_fill_(~allowed, float("-inf"))
        mask = mask.view(rows, 1, 1, new, length).expand(rows, 1, repeat, new, length).reshape(rows, 1, -1, length)
        deltas = iter(self.lora.choose(slots))
        x = self._embedding(torch.tensor(ids, device=self.device))
        for layer, store in zip(self._layers, self.cache.layers, strict=True):
            h = layer.attention_norm(x)
            qkv = add_delta(layer.qkv(h), h, next(deltas)).view(len(ids), -1, self._head_dim)
            queries_keys = qkv[:, : self._heads + self._groups]
            if layer.query_norm and layer.key_norm:
                queries_keys[:, : self._heads] = layer.query_norm(queries_keys[:, : self._heads])
                queries_keys[:, self._heads :] = layer.key_norm(queries_keys[:, self._heads :])
            turned = queries_keys.roll(self._head_dim // 2, -1)
            queries_keys.mul_(cos).addcmul_(turned, sin)
            # Indices on both sides of a slice put the heads last: [rows x new, 2 x groups, head_dim].
            store[row_index, :, positions] = qkv[:, self._heads :]
            queries = qkv[:, : self._heads].view(rows, new, self._groups, repeat, self._head_dim)
            attended = F.scaled_dot_product_attention(
                queries.permute(0, 2, 3, 1, 4).reshape(rows, self._groups, repeat * new, self._head_dim),
                store[cached, : self._groups, :length],
                store[cached, self._groups :, :length],
                attn_mask=mask,
            )
            attended = attended.view(rows, self._groups, repeat, new, self._head_dim).permute(0, 3, 1, 2, 4)
            attended = attended.reshape(len(ids), -1)
            x = x + add_delta(layer.out(attended), attended, next(deltas))
            h = layer.mlp_norm(x)
            gate_up = add_delta(layer.gate_up(h), h, next(deltas))
            h = F.silu(gate_up[:, : self._inner]).mul_(gate_up[:, self._inner :])
            x = x + add_delta(layer.down(h), h, next(deltas))
        return x

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(self._norm(hidden)).float()

    def _rotations(self, rotary: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin of all positions [context, 1, head_dim]: x cos + roll(x, half) sin turns by the angle."""
        probe = torch.zeros(1, dtype=self.dtype, device=self.device)
        cos, sin = rotary(probe, torch.arange(self.context, device=self.device)[None])
        signs = torch.ones(self._head_dim, device=self.device)
        signs[: self._head_dim // 2] = -1
        return cos[0][:, None].contiguous(), (sin[0] * signs.to(sin.dtype))[:, None].contiguous()


def _norm(module: Any) -> _Norm:
    return _Norm(module.weight, float(module.variance_epsilon))


def _read_layer(layer: Any, precision: PackedPrecision) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    has_norms = hasattr(attention, "q_norm")
    return _Layer(
        attention_norm=_norm(layer.input_layernorm),
        qkv=pack([attention.q_proj, attention.k_proj, attention.v_proj], precision),
        query_norm=_norm(attention.q_norm) if has_norms else None,
        key_norm=_norm(attention.k_norm) if has_norms else None,
        out=pack([attention.o_proj], precision),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=pack([mlp.gate_proj, mlp.up_proj], precision),
        down=pack([mlp.down_proj], precision),
    )


def _stacks(layers: Any, slots: int, rows: int) -> list[FusedStack]:
    stacks = []
    for number, layer in enumerate(layers):
        for block, names in _GROUPS:
            parts, start = [], 0
            for name in names:
                linear = getattr(getattr(layer, block), name)
                parts.append(Part(f"model.layers.{number}.{block}.{name}", start, linear.out_features))
                start += linear.out_features
            stacks.append(FusedStack(parts, linear.in_features, slots=slots, rows=rows))
    return stacks
