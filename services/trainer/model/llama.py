"""A Llama's training forward over flat tokens, from the fused pieces; a drop-in for transformers' on CPUs and,
in bf16, on GPUs.

The modules stay transformers' and peft's: this reads their weights, computes what they would compute, and gives their
LoRA matrices the same gradients. Layers that only few tokens need are only computed for those.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from services.trainer.model.frozen import Buffer, FrozenLinears
from services.trainer.model.llama_kernels import (
    Bounds,
    attend_per_sample,
    attend_together,
    gated,
    head_loss,
    norm_branch,
    rotate_and_split,
    swiglu,
)
from services.trainer.model.lora_kernels import Kept, Lora, lora_linears
from shared.training.memory import LOSS_ROWS

# Rows of logits that a GPU makes at a time: it needs more work at once than a CPU.
GPU_LOSS_ROWS = 1024
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FusedLayer:
    """One decoder layer: its frozen linears, and the modules that peft attaches LoRA to."""

    def __init__(self, layer: Any, linears: Callable[[list[nn.Linear]], FrozenLinears]) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.layer = layer
        self.query_key_value = linears([attention.q_proj, attention.k_proj, attention.v_proj])
        self.output = linears([attention.o_proj])
        self.gate_up = linears([mlp.gate_proj, mlp.up_proj])
        self.down = linears([mlp.down_proj])

    def attention_loras(self) -> list[Lora]:
        attention = self.layer.self_attn
        return _loras(self.query_key_value, attention.q_proj, attention.k_proj, attention.v_proj)


@dataclass(frozen=True, slots=True)
class _Samples:
    """What all layers need to know of the tokens: their rotations, and which belong together.

    Attributes:
        cos, sin: [tokens, 1, dimension / 2].
        where: tokens of each sample; bounds where attention is over all at once.
    """

    cos: Tensor
    sin: Tensor
    where: list[int] | Bounds


class FusedLlama:
    """A base whose linear layers are ready to be multiplied together; made once, before any LoRA is attached.

    Args:
        dtype: of the frozen layers' products, fp32 or bf16; everything else is fp32.
        as_gpu: compute as GPUs do: attention over all samples at once, more logits at a time, and what is kept for the
            gradient of norms, SwiGLU and LoRA in bf16. None: as the model's own device does.

    Attributes:
        kept: dtype of what is kept for the gradient; None for what it is computed in.
        loss_rows: rows of logits made at a time.
    """

    def __init__(self, model: Any, dtype: torch.dtype, *, as_gpu: bool | None = None) -> None:
        self._as_gpu = model.device.type != "cpu" if as_gpu is None else as_gpu
        self.kept = torch.bfloat16 if self._as_gpu else None
        self.loss_rows = GPU_LOSS_ROWS if self._as_gpu else LOSS_ROWS
        linears = partial(FrozenLinears, in_bf16=dtype == torch.bfloat16, as_gpu=self._as_gpu)
        self.dtype = dtype
        shared = Buffer(model.device)
        self.layers = [FusedLayer(layer, partial(linears, buffer=shared)) for layer in model.model.layers]
        # Not in the shared buffer: a dequantised output head is larger than all else together.
        self.head = linears([model.lm_head], Buffer(model.device))
        self._model = model.model

    def logits(self, ids: Tensor, positions: Tensor, lengths: list[int], rows: Tensor) -> Tensor:
        """Logits [rows, vocabulary] after the tokens `rows` of packed ids, positions int64 [tokens]."""
        with torch.autocast(ids.device.type, enabled=False):
            return lora_linears(self._hidden(ids, positions, lengths, rows), None, self.head, [])

    def loss(self, ids: Tensor, positions: Tensor, lengths: list[int], rows: Tensor, labels: Tensor) -> Tensor:
        """Summed cross-entropy of labels int64 [rows] after the tokens `rows`."""
        with torch.autocast(ids.device.type, enabled=False):
            hidden = self._hidden(ids, positions, lengths, rows)
            return head_loss(hidden, self.head, labels, self.loss_rows)

    def _hidden(self, ids: Tensor, positions: Tensor, lengths: list[int], rows: Tensor) -> Tensor:
        model = self._model
        x: Tensor = model.embed_tokens(ids)
        cos, sin = (t[0, :, None, : t.shape[-1] // 2].contiguous() for t in model.rotary_emb(x, positions[None]))
        samples = _Samples(cos, sin, Bounds.of(lengths, x.device) if self._as_gpu else lengths)
        for layer in self.layers[:-1]:
            x = self._layer(layer, x, samples, None)
        x = self._layer(self.layers[-1], x, samples, rows)
        return norm_branch(x, model.norm.weight, model.config.rms_norm_eps, self.kept)[1]

    def _layer(self, fused: FusedLayer, x: Tensor, samples: "_Samples", rows: Tensor | None) -> Tensor:
        """One decoder layer of x [tokens, hidden]; the output is that of the tokens `rows` only, if given."""
        layer = fused.layer
        residual, normed, kept = self._norm(x, layer.input_layernorm.weight)
        joined = lora_linears(normed, None, fused.query_key_value, fused.attention_loras(), kept)
        attn_output, kept = self._attend(joined, samples)
        if rows is not None:
            attn_output, residual, kept = attn_output[rows], residual[rows], None
        x = lora_linears(attn_output, residual, fused.output, _loras(fused.output, layer.self_attn.o_proj), kept)
        residual, normed, kept = self._norm(x, layer.post_attention_layernorm.weight)
        gate_up = _loras(fused.gate_up, layer.mlp.gate_proj, layer.mlp.up_proj)
        product, kept = self._swiglu(lora_linears(normed, None, fused.gate_up, gate_up, kept))
        return lora_linears(product, residual, fused.down, _loras(fused.down, layer.mlp.down_proj), kept)

    def _norm(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Kept | None]:
        residual, normed, scaled = norm_branch(x, weight, self._model.config.rms_norm_eps, self.kept)
        # One pass more in the backward pass, which a CPU has no memory to gain by.
        return residual, normed, Kept(scaled, partial(torch.mul, weight)) if self.kept else None

    def _attend(self, joined: Tensor, samples: "_Samples") -> tuple[Tensor, Kept | None]:
        """Causal attention of each sample by itself: [tokens, heads x dimension]."""
        queries, keys = self._model.config.num_attention_heads, self._model.config.num_key_value_heads
        rotated, values = rotate_and_split(joined, samples.cos, samples.sin, queries + keys)
        if not isinstance(samples.where, Bounds):
            return attend_per_sample(rotated, values, samples.where, queries).flatten(1), None
        attn_output, kept = attend_together(rotated, values, samples.where, queries)
        return attn_output.flatten(1), Kept(kept, lambda narrow: narrow.flatten(1).float())

    def _swiglu(self, joined: Tensor) -> tuple[Tensor, Kept | None]:
        if self.kept is None:
            return swiglu(joined), None
        kept = joined.detach().to(self.kept)
        return swiglu(joined, kept), Kept(kept, lambda narrow: gated(narrow.float()))


def fuse(model: Any, dtype: torch.dtype) -> None:
    """Let a frozen, LoRA-free model train through the fused pieces where they are known to be the same function."""
    if can_fuse(model, dtype):
        model.fused = FusedLlama(model, dtype)


def can_fuse(model: Any, dtype: torch.dtype) -> bool:
    """Whether the pieces compute what this model computes in `dtype`: on a GPU, as far as flash attention does."""
    config, device = model.config, model.device
    if config.model_type != "llama" or config.hidden_act != "silu":
        return False
    if not all(_is_plain(module) for name, module in model.named_modules() if name.endswith(_LINEARS)):
        return False
    if device.type == "cpu":
        return True
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(able and dtype == torch.bfloat16 and width % 8 == 0 and width <= 256)


def fused_form(model: Any) -> FusedLlama | None:
    """The fused form of a model, LoRA attached or not; None where transformers' own forward is to be used."""
    fused: FusedLlama | None = getattr(model, "fused", None)
    if fused is None or hasattr(model.lm_head, "lora_A"):
        return None
    kind = model.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    return fused if fused.dtype == dtype else None


def _is_plain(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.bias is None


def _loras(frozen: FrozenLinears, *modules: Any) -> list[Lora]:
    """The LoRA matrices that peft has put on some of the modules."""
    loras = []
    for module, columns in zip(modules, frozen.slices, strict=True):
        for name in getattr(module, "lora_A", {}):
            dropout = module.lora_dropout[name]
            rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            loras.append(Lora(columns, a, b, module.scaling[name], rate))
    return loras
