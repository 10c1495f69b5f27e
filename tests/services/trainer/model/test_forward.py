"""The oracles of the training forward: a sample alone, another layout, transformers' own loss."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from services.trainer.data.layout import pack_rows
from services.trainer.model.attention import attend_per_sample
from services.trainer.model.forward import Sample, loss_sum, pack, supervised_logits, training_forward
from services.trainer.model.llama import fuse
from services.trainer.model.lora import lora_attached, trainable
from services.trainer.model.precision import Precision
from services.trainer.recipe.step import accumulate_gradients
from shared.jobs.spec import LoraSpec
from tests.rounding import close, llama_sums, rounding
from tests.services.trainer.harness import CPU, TinyJob, ignore

VOCABULARY, EOS = 97, 2


def random_llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attn_implementation="sdpa",
        pad_token_id=EOS,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config).eval()
    # transformers' norm rounds to fp32 on its way, which float64 comparisons would see; torch's is the same function.
    for name, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            model.set_submodule(name, torch.nn.RMSNorm(32, eps=module.variance_epsilon))
    return model.requires_grad_(False)


def random_llama_as(form: str) -> LlamaForCausalLM:
    """The same function, computed by our fused pieces or by transformers."""
    model = random_llama()
    if form == "fused":
        fuse(model, torch.float32)
    elif form == "per sample":
        attend_per_sample(model)
    return model


def ragged(lengths: Sequence[int], seed: int = 0) -> list[Sample]:
    """Samples of these lengths, with a random prompt part and EOS within and at the end."""
    draw = np.random.default_rng(seed)
    samples = []
    for length in lengths:
        ids = draw.integers(0, VOCABULARY, length)
        ids[-1] = EOS
        supervised = np.arange(length) >= draw.integers(1, length)
        samples.append((ids.astype(np.int64), supervised))
    return samples


@pytest.fixture(params=["fused", "per sample", "block mask"])
def model(request: pytest.FixtureRequest) -> Any:
    return random_llama_as(request.param)


LENGTHS = [17, 5, 40, 2, 23, 31, 9, 12]


def test_a_packed_samples_logits_are_its_own_alone(model: Any) -> None:
    samples = ragged(LENGTHS)
    together = supervised_logits(model, pack(samples, CPU))
    alone = torch.cat([supervised_logits(model, pack([sample], CPU)) for sample in samples])
    assert close(together, alone, rounding(torch.float32, llama_sums(model.config, max(LENGTHS))))


def test_a_sample_does_not_see_its_neighbours(model: Any) -> None:
    first, second = ragged([9, 14])
    other = ragged([9], seed=5)[0]
    own = int(second[1].sum())
    logits = [supervised_logits(model, pack([neighbour, second], CPU))[-own:] for neighbour in (first, other)]
    assert close(logits[0], logits[1], rounding(torch.float32, llama_sums(model.config, 14)))


def test_the_first_token_of_a_sample_is_never_predicted() -> None:
    samples = ragged(LENGTHS)
    packed = pack(samples, CPU)
    starts = set(np.cumsum([0, *packed.lengths[:-1]]).tolist())
    assert not starts & set((packed.predictors + 1).tolist())
    with pytest.raises(AssertionError):
        pack([(np.array([1, 2]), np.array([True, True]))], CPU)


@pytest.mark.parametrize("length", [2, 33])
def test_the_loss_is_transformers_own_on_one_sample(model: Any, length: int) -> None:
    ((ids, supervised),) = ragged([length])
    labels = torch.tensor(np.where(supervised, ids, -100))[None]
    oracle = random_llama()(input_ids=torch.tensor(ids)[None], labels=labels).loss
    actual = loss_sum(model, pack([(ids, supervised)], CPU)) / int(supervised.sum())
    assert close(actual, oracle, rounding(torch.float32, llama_sums(model.config, length)))


def full_precision(dtype: torch.dtype) -> Precision:
    return Precision(CPU, dtype, nullcontext, None)


def gradients(model: Any, samples: list[Sample], layout: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    parameters = trainable(model)
    for parameter in parameters.values():
        parameter.grad = None
    packs = [pack([samples[row] for row in rows], CPU) for rows in layout]
    with training_forward(model, dropout=True):
        accumulate_gradients(model, packs, full_precision(dtype), ignore)
    return [p.grad.clone() for p in parameters.values() if p.grad is not None]


@pytest.fixture(scope="module", params=["fused", "per sample", "block mask"])
def lora_model(request: pytest.FixtureRequest) -> Iterator[Any]:
    """LoRA without dropout on all linear layers, B moved off zero so that A has gradients too."""
    base = random_llama_as(request.param)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    with lora_attached(base, LoraSpec(dropout=0, target_modules=targets), 7) as model:
        for name, parameter in trainable(model).items():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.05)
        yield model


LAYOUTS: dict[str, Callable[[list[int], list[int]], list[tuple[int, ...]]]] = {
    "2x4": lambda rows, _: [tuple(rows[i : i + 2]) for i in range(0, len(rows), 2)],
    "one by one": lambda rows, _: [(row,) for row in rows],
    "sorted": lambda rows, lengths: [(row,) for row in sorted(rows, key=lambda r: lengths[r])],
    "tight budget": lambda rows, lengths: pack_rows(rows, np.asarray(lengths), 48),
    "wide budget": lambda rows, lengths: pack_rows(rows, np.asarray(lengths), 10_000),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_gradients_do_not_depend_on_the_layout(
    lora_model: Any, dtype: torch.dtype, lengths: list[int], seed: int
) -> None:
    """Ragged lengths; a short list is the last partial step of an epoch."""
    lora_model.to(dtype)
    samples, rows = ragged(lengths, seed), list(range(len(lengths)))
    reference = gradients(lora_model, samples, [tuple(rows)], dtype)
    bound = rounding(dtype, [*llama_sums(lora_model.config, max(lengths), backward=True), sum(lengths)])
    # Samples of two tokens have no attention to learn: what is left of that gradient is rounding, of sums of this size.
    whole = torch.cat([expected.flatten() for expected in reference]).norm()
    for name, layout in LAYOUTS.items():
        batches = layout(rows, lengths)
        assert sorted(chain(*batches)) == rows
        for expected, actual in zip(reference, gradients(lora_model, samples, batches, dtype), strict=True):
            assert close(actual, expected, bound, at_least=float(whole) / 1000), name


@pytest.mark.parametrize("lengths", [[2], [2, 2], [2] * 8])
def test_samples_without_attention_leave_its_gradient_at_zero(lora_model: Any, lengths: list[int]) -> None:
    """The first token attends to itself alone, whatever query and key say."""
    lora_model.to(torch.float64)
    names = [name for name, parameter in lora_model.named_parameters() if parameter.requires_grad]
    found = gradients(lora_model, ragged(lengths, 0), [tuple(range(len(lengths)))], torch.float64)
    whole = torch.cat([gradient.flatten() for gradient in found]).norm()
    attention = [g for name, g in zip(names, found, strict=True) if "q_proj" in name or "k_proj" in name]
    assert attention
    assert all(float(gradient.norm()) <= 1e-14 * float(whole) for gradient in attention)


def test_a_packed_samples_gradients_are_its_own_alone(lora_model: Any) -> None:
    lora_model.to(torch.float64)
    samples = ragged(LENGTHS)
    packed = gradients(lora_model, samples, [tuple(range(8))], torch.float64)
    supervised = [int(flags.sum()) for _, flags in samples]
    alone = [gradients(lora_model, [sample], [(0,)], torch.float64) for sample in samples]
    bound = rounding(torch.float64, [*llama_sums(lora_model.config, max(LENGTHS), backward=True), sum(LENGTHS)])
    for index, expected in enumerate(packed):
        weighted = [count * grads[index] for count, grads in zip(supervised, alone, strict=True)]
        assert close(torch.stack(weighted).sum(0) / sum(supervised), expected, bound)


def test_eos_is_supervised_though_pad_is_eos(lora_model: Any) -> None:
    """The logit of EOS at the end of a response gets a gradient that raises it."""
    lora_model.to(torch.float32)
    ids, supervised = np.array([5, 6, 7, EOS]), np.array([False, False, True, True])
    packed = pack([(ids, supervised)], CPU)
    assert packed.labels.tolist() == [7, EOS]
    logits = supervised_logits(lora_model, packed)
    logits.retain_grad()
    torch.nn.functional.cross_entropy(logits, packed.labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad[1, EOS] < 0


def test_int8_evaluates_with_the_training_forward(tiny: TinyJob) -> None:
    """bitsandbytes' eval path on a CPU is another function; ours equals the dequantised weights' fp32 product."""
    base, _ = tiny.bases.load(tiny.spec(), torch.float32)
    model = base.loaded.model
    packed = pack(ragged(LENGTHS), CPU)
    with torch.no_grad(), training_forward(model, dropout=False):
        ours = loss_sum(model, packed)
        assert not model.training
        layer = model.model.layers[0].self_attn.q_proj
        scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        dequantised = layer.weight.data.float() * scale[:, None] / 127
        x = torch.randn(3, 32)
        assert close(layer(x), x @ dequantised.T, rounding(torch.float32, [32]))
    model.fused = None
    with torch.no_grad(), training_forward(model, dropout=False):
        assert close(ours, loss_sum(model, packed), rounding(torch.float32, llama_sums(model.config, max(LENGTHS))))
    with torch.no_grad():
        assert not layer.training
        assert not close(layer(x), x @ dequantised.T, 1e-3)
