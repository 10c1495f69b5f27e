"""Forward passes of Llama-architecture decoders on plain tensors: q, k, v fused, gate and up fused, weights packed.

When a few rows decode one token each, a third of the time of transformers' forward pass is Python and framework
overhead. This one makes few calls per layer and none through modules; its results equal transformers' up to rounding.
Owns positions, masks and the order of operations. Knows no requests, no sampling and no text.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from services.inference.engine.base_shape import head_dim
from services.inference.engine.fused_lora import FusedLora, Part, Product, add_delta
from services.inference.engine.key_values import KeyValues
from services.inference.engine.packed import Embedding, Linear, PackedPrecision, pack
from services.inference.engine.runner import Piece

_ARCHITECTURES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
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


def has_llama_architecture(model: Any) -> bool:
    """Whether `LlamaRunner` computes what this transformers model computes."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    plain = all(type(module) is torch.nn.Linear for path, module in model.named_modules() if path.endswith("_proj"))
    return bool(
        config.model_type in _ARCHITECTURES
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in _FIXED_ROPE
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and (getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True))
        and plain
    )


class LlamaRunner:
    """A `ModelRunner` with weights of its own; `has_llama_architecture` says for which models.

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
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = head_dim(config)
        self._inner = config.intermediate_size
        self._embedding = Embedding(weight, precision)
        self._layers = [_read_layer(layer, precision) for layer in decoder.layers]
        self._norm = _norm(decoder.norm)
        self._head = pack([model.lm_head], precision)
        self._cos, self._sin = self._rotations(decoder.rotary_emb)
        self.lora = FusedLora(
            products(decoder.layers),
            slots=adapter_slots,
            rows=rows,
            dtype=self.dtype,
            device=self.device,
        )
        self.cache = KeyValues(
            layers=len(self._layers),
            rows=rows,
            heads=self.groups,
            capacity=self.context,
            head_dim=self._head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    def prefill(self, row: int, ids: Sequence[int], start: int, slot: int, *, all_logits: bool) -> torch.Tensor:
        """See `ModelRunner.prefill`."""
        hidden = self._forward(_Pieces(self, [Piece(row, ids, start, slot)]))
        return self._logits(hidden if all_logits else hidden[-1:])

    def prefill_together(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """See `ModelRunner.prefill_together`."""
        batch = _Pieces(self, pieces)
        return self._logits(self._forward(batch)[[span.stop - 1 for span in batch.spans]])

    def decode(self, first: int, ids: Sequence[int], positions: Sequence[int], slots: Sequence[int]) -> torch.Tensor:
        """See `ModelRunner.decode`."""
        return self._logits(self._forward(_Rows(self, first, ids, positions, slots)))

    def _forward(self, batch: "_Rows | _Pieces") -> torch.Tensor:
        """Hidden states [tokens, hidden] of the batch's tokens, their keys and values put into the cache."""
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]
        product = itertools.count()
        x = self._embedding(batch.ids)
        for layer, store in zip(self._layers, self.cache.layers, strict=True):
            h = layer.attention_norm(x)
            qkv = batch.add_lora(next(product), layer.qkv(h), h).view(len(h), -1, self._head_dim)
            queries_keys = qkv[:, : self.heads + self.groups]
            if layer.query_norm and layer.key_norm:
                queries_keys[:, : self.heads] = layer.query_norm(queries_keys[:, : self.heads])
                queries_keys[:, self.heads :] = layer.key_norm(queries_keys[:, self.heads :])
            rotated = queries_keys.roll(self._head_dim // 2, -1)
            queries_keys.mul_(cos).addcmul_(rotated, sin)
            # Indices on both sides of a slice come first: [tokens, 2, groups, head_dim].
            store[:, batch.rows, :, batch.positions] = qkv[:, self.heads :].view(len(h), 2, self.groups, -1)
            attn_output = batch.attend(qkv[:, : self.heads].view(len(h), self.groups, -1, self._head_dim), store)
            x = x + batch.add_lora(next(product), layer.out(attn_output), attn_output)
            h = layer.mlp_norm(x)
            gate_up = batch.add_lora(next(product), layer.gate_up(h), h)
            h = F.silu(gate_up[:, : self._inner]).mul_(gate_up[:, self._inner :])
            x = x + batch.add_lora(next(product), layer.down(h), h)
        return x

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(self._norm(hidden)).float()

    def _rotations(self, rotary: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin of all positions [context, 1, head_dim]: x cos + roll(x, half) sin rotates x."""
        probe = torch.zeros(1, dtype=self.dtype, device=self.device)
        cos, sin = rotary(probe, torch.arange(self.context, device=self.device)[None])
        signs = torch.ones(self._head_dim, device=self.device)
        signs[: self._head_dim // 2] = -1
        return cos[0][:, None].contiguous(), (sin[0] * signs.to(sin.dtype))[:, None].contiguous()


class _Rows:
    """One token for each of neighbouring rows, every row at its own position and with its own adapter."""

    def __init__(
        self, runner: LlamaRunner, first: int, ids: Sequence[int], positions: Sequence[int], slots: Sequence[int]
    ) -> None:
        self.ids = torch.tensor(ids, device=runner.device)
        self.positions = torch.tensor(positions, device=runner.device)
        self.rows = torch.arange(first, first + len(ids), device=runner.device)
        self._cached, self._length = slice(first, first + len(ids)), max(positions) + 1
        mask = _mask(self.positions, self._length, runner.dtype)[:, None, None]
        self._mask = mask.expand(-1, runner.groups, runner.heads // runner.groups, -1)
        self._flat_mask = self._mask.flatten(0, 1)
        self._deltas = runner.lora.choose(slots)

    def add_lora(self, product: int, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What the rows' adapters add to fused product number `product`."""
        return add_delta(y, x, self._deltas[product])

    def attend(self, queries: torch.Tensor, store: torch.Tensor) -> torch.Tensor:
        """[rows, groups, queries per group, head_dim] → [rows, hidden]: a group's queries read one key head."""
        keys, values = store[:, self._cached, :, : self._length]
        if store.device.type != "cpu":
            attn_output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=self._mask)
            return attn_output.reshape(len(queries), -1)
        # For one token or a few, torch's flash kernel takes twice as long on several cores as these three calls.
        query, keys, values = queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
        scale: float = queries.shape[-1] ** -0.5
        scores = torch.baddbmm(self._flat_mask, query, keys.transpose(1, 2), alpha=scale)
        return torch.bmm(scores.softmax(-1), values).view(len(queries), -1)


class _Pieces:
    """Pieces of prompts, one behind the other: products over all of them at once, attention and LoRA piece by piece."""

    def __init__(self, runner: LlamaRunner, pieces: Sequence[Piece]) -> None:
        lengths = [len(piece.ids) for piece in pieces]
        ends = list(itertools.accumulate(lengths))
        self.spans = [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]
        device = runner.device
        self.ids = torch.tensor([token for piece in pieces for token in piece.ids], device=device)
        self.positions = torch.cat([torch.arange(p.start, p.start + len(p.ids), device=device) for p in pieces])
        self.rows = torch.tensor([piece.row for piece in pieces for _ in piece.ids], device=device)
        self._pieces = pieces
        self._masks = [
            _mask(self.positions[span], piece.start + len(piece.ids), runner.dtype)
            for piece, span in zip(pieces, self.spans, strict=True)
        ]
        self._deltas = [runner.lora.choose([piece.slot]) for piece in pieces]

    def add_lora(self, product: int, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What the pieces' adapters add to fused product number `product`."""
        for span, deltas in zip(self.spans, self._deltas, strict=True):
            if deltas[product] is not None:
                add_delta(y[span], x[span], deltas[product])
        return y

    def attend(self, queries: torch.Tensor, store: torch.Tensor) -> torch.Tensor:
        """[tokens, groups, queries per group, head_dim] → [tokens, hidden]."""
        attn_output = torch.empty_like(queries)
        for piece, span, mask in zip(self._pieces, self.spans, self._masks, strict=True):
            new, groups, repeat, head_dim = queries[span].shape
            keys, values = store[:, piece.row, :, : mask.shape[1]]
            # A group's queries of all tokens read one key head: [groups, repeat x new, head_dim].
            query = queries[span].permute(1, 2, 0, 3).reshape(1, groups, repeat * new, head_dim)
            output = F.scaled_dot_product_attention(query, keys[None], values[None], attn_mask=mask.repeat(repeat, 1))
            attn_output[span] = output.view(groups, repeat, new, head_dim).permute(2, 0, 1, 3)
        return attn_output.reshape(len(queries), -1)


def _mask(positions: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """[tokens, length] to add to scores: 0 up to a token's own position, -inf after it."""
    later = torch.arange(length, device=positions.device) > positions[:, None]
    return torch.zeros(later.shape, dtype=dtype, device=positions.device).masked_fill_(later, float("-inf"))


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


def products(layers: Any) -> list[Product]:
    """The fused products of a decoder's layers, in the order the forward pass needs them."""
    found = []
    for number, layer in enumerate(layers):
        for block, names in _GROUPS:
            parts, start = [], 0
            for name in names:
                linear = getattr(getattr(layer, block), name)
                parts.append(Part(f"model.layers.{number}.{block}.{name}", start, linear.out_features))
                start += linear.out_features
            found.append(Product(parts, linear.in_features))
    return found
