"""Each hand-written gradient against autograd's of the plain formula, in float64."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from services.trainer.model import lora_kernels
from services.trainer.model.frozen import Buffer, FrozenLinears
from services.trainer.model.llama_kernels import attend_per_sample, head_loss, norm_branch, rotate_and_split, swiglu
from services.trainer.model.lora_kernels import Kept, Lora, lora_linears
from tests.rounding import close, rounding

# No function here passes more than a few sums, and none is longer than the most targets.
BOUND = rounding(torch.float64, [300] * 8)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def wide(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, dtype=torch.float64).requires_grad_(False)


def same_gradients(ours: Tensor, plain: Tensor, inputs: list[Tensor]) -> None:
    """Both outputs and, for one random cotangent, the gradients of all inputs."""
    assert close(ours, plain, BOUND)
    cotangent = torch.randn_like(plain)
    pairs = zip(
        torch.autograd.grad(ours, inputs, cotangent), torch.autograd.grad(plain, inputs, cotangent), strict=True
    )
    for actual, expected in pairs:
        assert actual.shape == expected.shape
        assert close(actual, expected, BOUND)


def test_the_norm_and_its_residual() -> None:
    x, weight = wide(5, 8), torch.rand(8, dtype=torch.float64)
    residual, normed, scaled = norm_branch(x, weight, 1e-5)
    assert close((scaled * weight).detach(), normed.detach(), BOUND)
    assert not scaled.requires_grad
    plain = torch.cat([x, nn.functional.rms_norm(x, (8,), weight, 1e-5)])
    same_gradients(torch.cat([residual, normed]), plain, [x])


def test_rotation_and_split() -> None:
    tokens, half, rotated, values = 7, 4, 3, 2
    joined = wide(tokens, (rotated + values) * 2 * half)
    angles = torch.rand(tokens, 1, half, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    parts = rotate_and_split(joined, cos, sin, rotated)
    heads = joined.view(tokens, -1, 2 * half)
    a, b = heads[:, :rotated].chunk(2, -1)
    plain = torch.cat([torch.cat([a * cos - b * sin, b * cos + a * sin], -1), heads[:, rotated:]], 1)
    same_gradients(torch.cat(parts, 1), plain, [joined])


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (6, 2)])
def test_attention_of_each_sample_by_itself(queries: int, keys: int) -> None:
    lengths, half = [5, 1, 9], 4
    rotated, values = wide(sum(lengths), queries + keys, 2 * half), wide(sum(lengths), keys, 2 * half)
    plain = []
    for both, own in zip(torch.split(rotated, lengths), torch.split(values, lengths), strict=True):
        key, value = (t.repeat_interleave(queries // keys, 1) for t in (both[:, queries:], own))
        scores = torch.einsum("ihd,jhd->hij", both[:, :queries], key) / (2 * half) ** 0.5
        hidden = torch.ones(len(both), len(both)).triu(1).bool()
        plain.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, float("-inf")).softmax(-1), value))
    same_gradients(attend_per_sample(rotated, values, lengths, queries), torch.cat(plain), [rotated, values])


def test_swiglu() -> None:
    joined = wide(6, 10)
    gate, up = joined.chunk(2, -1)
    same_gradients(swiglu(joined), functional.silu(gate) * up, [joined])


@pytest.mark.parametrize(
    ("with_lora", "with_residual"), list(itertools.product([[], [0], [0, 2], [0, 1, 2]], [False, True]))
)
def test_linears_with_lora(with_lora: list[int], with_residual: bool) -> None:
    layers = [linear(6, width) for width in (4, 2, 3)]
    x, residual = wide(5, 6), wide(5, 9) if with_residual else None
    frozen = FrozenLinears(layers, Buffer())
    loras = [
        Lora(frozen.slices[i], wide(2 + i, 6), wide(layers[i].out_features, 2 + i), 1.5 + i, 0.0) for i in with_lora
    ]
    outputs = [layer(x) for layer in layers]
    for i, lora in zip(with_lora, loras, strict=True):
        outputs[i] = outputs[i] + lora.scale * (x @ lora.a.T @ lora.b.T)
    plain = torch.cat(outputs, 1) + (residual if residual is not None else 0)
    inputs = [x, *([residual] if residual is not None else []), *(t for lora in loras for t in (lora.a, lora.b))]
    same_gradients(lora_linears(x, residual, frozen, loras), plain, inputs)


def test_what_an_input_is_made_of_serves_its_gradients_as_well_as_the_input() -> None:
    x, weight = wide(5, 6), torch.rand(6, dtype=torch.float64)
    frozen = FrozenLinears([linear(6, 4)], Buffer())
    lora = Lora(frozen.slices[0], wide(2, 6), wide(4, 2), 1.5, 0.0)
    _, normed, scaled = norm_branch(x, weight, 1e-5)
    ours = lora_linears(normed, None, frozen, [lora], Kept(scaled, partial(torch.mul, weight)))
    same_gradients(
        ours, lora_linears(nn.functional.rms_norm(x, (6,), weight, 1e-5), None, frozen, [lora]), [x, lora.a, lora.b]
    )


def test_what_is_kept_in_bf16_costs_gradients_its_rounding_and_results_nothing() -> None:
    x, weight, joined = torch.randn(50, 64, requires_grad=True), torch.rand(64), torch.randn(50, 64, requires_grad=True)
    pairs = [
        (norm_branch(x, weight, 1e-5, torch.bfloat16)[1], norm_branch(x, weight, 1e-5)[1], x),
        (swiglu(joined, joined.detach().bfloat16()), swiglu(joined), joined),
    ]
    for ours, exact, leaf in pairs:
        assert torch.equal(ours, exact)
        cotangent = torch.randn_like(exact)
        ((near,), (expected,)) = (torch.autograd.grad(each, leaf, cotangent) for each in (ours, exact))
        assert not torch.equal(near, expected)
        assert float((near - expected).norm()) <= 2**-8 * float(expected.norm())


def test_dropout_is_drawn_for_each_lora_and_its_gradient_uses_the_same_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    real = lora_kernels._dropout_mask

    def recorded(x: Tensor, rate: float) -> Tensor | None:
        mask = real(x, rate)
        assert mask is not None
        drawn.append(mask)
        return mask

    monkeypatch.setattr(lora_kernels, "_dropout_mask", recorded)
    layers, rate = [linear(6, 4), linear(6, 3)], 0.25
    x, frozen = wide(5, 6), FrozenLinears(layers, Buffer())
    loras = [
        Lora(part, wide(2, 6), wide(layer.out_features, 2), 2.0, rate)
        for part, layer in zip(frozen.slices, layers, strict=True)
    ]
    ours = lora_linears(x, None, frozen, loras)
    assert not torch.equal(*drawn)
    plain = torch.cat(
        [
            layer(x) + lora.scale * ((x * mask / (1 - rate)) @ lora.a.T @ lora.b.T)
            for layer, lora, mask in zip(layers, loras, drawn, strict=True)
        ],
        1,
    )
    same_gradients(ours, plain, [x, *(t for lora in loras for t in (lora.a, lora.b))])


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(rate: float) -> None:
    n = 1_000_003
    mask = lora_kernels._dropout_mask(torch.empty(n), rate)
    assert mask is not None
    kept = float(mask.float().mean())
    assert abs(kept - (1 - rate)) < 5 * (rate * (1 - rate) / n) ** 0.5
    scale = lora_kernels._scale(Lora(slice(0, 1), torch.empty(1, 1), torch.empty(1, 1), 1.0, rate))
    assert kept * scale == pytest.approx(1, abs=0.01)
    assert lora_kernels._dropout_mask(torch.empty(3), 0.0) is None


@pytest.mark.parametrize("targets", [1, 128, 300])
def test_the_loss_and_its_gradient_by_pieces(targets: int) -> None:
    head = linear(6, 50)
    hidden, labels = wide(targets, 6), torch.randint(0, 50, (targets,))
    ours = head_loss(hidden, FrozenLinears([head], Buffer()), labels)
    same_gradients(ours, functional.cross_entropy(head(hidden), labels, reduction="sum"), [hidden])
    with torch.no_grad():
        torch.testing.assert_close(head_loss(hidden, FrozenLinears([head], Buffer()), labels), ours.detach())


@pytest.mark.parametrize("with_residual", [False, True])
def test_products_in_bf16_are_those_of_rounded_numbers(with_residual: bool) -> None:
    layers = [nn.Linear(64, width, bias=False).requires_grad_(False) for width in (4, 2)]
    x, grad, residual = torch.randn(5, 64), torch.randn(5, 6), torch.randn(5, 6) if with_residual else None
    frozen = FrozenLinears(layers, Buffer(), in_bf16=True)
    weight = torch.cat([layer.weight for layer in layers]).bfloat16().float()
    plain = x.bfloat16().float() @ weight.T + (residual if residual is not None else 0)
    ours = frozen.product(x, residual)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain, rtol=2**-8, atol=2**-8)
    torch.testing.assert_close(frozen.gradient(grad), grad.bfloat16().float() @ weight, rtol=2**-8, atol=2**-8)


def test_a_shared_buffer_is_filled_again_for_each_user_and_only_then() -> None:
    buffer, layers = Buffer(), [nn.Linear(8, 8, bias=False).half().requires_grad_(False) for _ in range(2)]
    first, second = (FrozenLinears([layer], buffer) for layer in layers)
    x = torch.randn(3, 8)
    for frozen, layer in [(first, layers[0]), (second, layers[1]), (first, layers[0]), (first, layers[0])]:
        assert close(frozen.product(x), x @ layer.weight.float().T, rounding(torch.float32, [8]))
        assert close(frozen.gradient(x), x @ layer.weight.float(), rounding(torch.float32, [8]))


def test_joined_weights_are_the_layers_own_until_they_move() -> None:
    layers: list[Any] = [linear(6, 4), linear(6, 3)]
    before = torch.cat([layer.weight for layer in layers])
    frozen = FrozenLinears(layers, Buffer())
    assert torch.equal(frozen._weight(torch.float64), before)
    assert frozen._weight(torch.float64).data_ptr() == layers[0].weight.data_ptr()
    assert torch.equal(frozen._weight(torch.float32), before.float())
    for layer in layers:
        layer.to(torch.float32)
    assert torch.equal(frozen._weight(torch.float32), before.float())
