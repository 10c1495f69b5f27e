"""LoRA for models of transformers: each linear layer adds what the adapters chosen for this forward pass add to it."""

from collections.abc import Sequence

import torch
from torch import nn

from services.inference.engine.fused_lora import Delta, Part, Product, add_delta


class Chosen:
    """What each layer adds in the current forward pass; shared by all of them."""

    def __init__(self) -> None:
        self.deltas: Sequence[Delta | None] = []


class LoraLinear(nn.Module):
    """A linear layer beside adapters.

    Args:
        number: its place in `chosen.deltas`.
    """

    def __init__(self, base: nn.Linear, chosen: Chosen, number: int) -> None:
        super().__init__()
        self.base = base
        self._chosen, self._number = chosen, number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, tokens, in] → [rows, tokens, out]; one row if they share an adapter, one token if not."""
        y: torch.Tensor = self.base(x)
        delta = self._chosen.deltas[self._number]
        if delta is None:
            return y
        dtype = delta[0].dtype
        added = add_delta(y.new_zeros(y.shape, dtype=dtype).flatten(0, 1), x.flatten(0, 1).to(dtype), delta)
        return y + added.view_as(y).to(y.dtype)


def linear_products(model: nn.Module) -> list[Product]:
    """The linear layers of a decoder as products of one part each."""
    return [Product([Part(path, 0, layer.out_features)], layer.in_features) for path, layer in _linear(model)]


def put_lora_into(model: nn.Module, chosen: Chosen) -> None:
    """Replace a decoder's linear layers by `LoraLinear`, in place, numbered as `linear_products` orders them."""
    for number, (path, layer) in enumerate(_linear(model)):
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, LoraLinear(layer, chosen, number))


def _linear(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.startswith("model.layers.")
    ]
