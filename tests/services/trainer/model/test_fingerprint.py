"""The fingerprint of a base: every bit of all that makes up its weights counts, and so does where it lies."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from services.trainer.model.fingerprint import BlockMixer, fingerprint, frozen_tensors
from shared.jobs.spec import BasePrecision
from tests.services.trainer.harness import TinyJob

CPU = torch.device("cpu")
MODULO = 1 << 64
# Of every 4-bit layer: its scales are 8-bit numbers, which have scales and an offset of their own.
NF4 = {"absmax", "code", "offset", "state2.absmax", "state2.code"}


def held(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a base, asked of torch's and bitsandbytes' objects one by one."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield name, tensor.data
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        state: Any = getattr(module, "state", None)
        for scales in (getattr(weight, "SCB", None), getattr(state, "SCB", None)):
            if scales is not None:
                yield f"{name}.SCB", scales
        if (quantised := getattr(weight, "quant_state", None)) is not None:
            tensors = {key: value for key, value in vars(quantised).items() if isinstance(value, Tensor)}
            nested = {f"state2.{key}": v for key, v in vars(quantised.state2).items() if isinstance(v, Tensor)}
            assert set(tensors | nested) == NF4
            yield from ((f"{name}.{key}", value) for key, value in (tensors | nested).items())


def bytes_of(tensor: Tensor) -> Tensor:
    """A tensor's own memory as uint8 [bytes]; it is contiguous."""
    return tensor.detach().view(-1).view(torch.uint8)


@pytest.mark.parametrize("mixed", [False, True], ids=["read by SHA-256", "mixed down"])
@pytest.mark.parametrize("precision", ["int8", "nf4", "bf16", "fp32"])
def test_one_bit_of_any_tensor_counts_and_so_does_its_place(
    tiny: TinyJob, precision: BasePrecision, mixed: bool
) -> None:
    model = tiny.bases.load(tiny.spec(base_precision=precision), torch.float32)[0].loaded.model
    before = fingerprint(model, mixed=mixed)
    tensors = list(held(model))
    assert len(tensors) >= {"int8": 14, "nf4": 14 * len(NF4)}.get(precision, 0) + 14
    for name, tensor in tensors:
        memory = bytes_of(tensor)
        for place, bit in ((0, 1), (len(memory) // 2, 16), (-1, 128)):
            memory[place] ^= bit
            assert fingerprint(model, mixed=mixed) != before, (name, place)
            memory[place] ^= bit
        half = len(memory) // 2
        parts = memory[:half], memory[half : 2 * half]
        if not torch.equal(*parts):
            swapped = torch.cat((parts[1], parts[0]))
            kept = memory.clone()
            memory[: 2 * half] = swapped
            assert fingerprint(model, mixed=mixed) != before, name
            memory.copy_(kept)
    assert fingerprint(model, mixed=mixed) == before


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("precision", ["int8", "nf4", "fp32"])
def test_two_rows_of_any_layer_do_not_change_places(tiny: TinyJob, precision: BasePrecision, mixed: bool) -> None:
    model = tiny.bases.load(tiny.spec(base_precision=precision), torch.float32)[0].loaded.model
    before = fingerprint(model, mixed=mixed)
    for name, weight in [(name, weight.data) for name, weight in model.named_parameters() if weight.dim() == 2]:
        # nf4's weights lie in one column: blocks of 64 numbers, two a byte.
        rows = weight.view(-1, 32) if weight.shape[1] == 1 else weight
        kept = rows.clone()
        assert not torch.equal(rows[0], rows[1])
        rows[[0, 1]] = kept[[1, 0]]
        assert fingerprint(model, mixed=mixed) != before, name
        rows.copy_(kept)
    assert fingerprint(model, mixed=mixed) == before


def test_no_memory_is_read_twice_and_a_part_does_not_hide_the_whole() -> None:
    whole = torch.arange(12.0)
    model = nn.Module()
    model.register_buffer("a_part", whole[:4])
    model.register_buffer("b_whole", whole)
    model.register_buffer("c_again", whole.view(3, 4))
    assert [name for name, _ in frozen_tensors(model)] == [".a_part", ".b_whole"]
    before = fingerprint(model)
    whole[11] += 1
    assert fingerprint(model) != before


def test_a_forward_pass_moves_scales_and_changes_no_fingerprint(tiny: TinyJob) -> None:
    model = tiny.bases.load(tiny.spec(base_precision="int8"), torch.float32)[0].loaded.model
    layer = model.model.layers[0].mlp.down_proj
    names = [name for name, _ in frozen_tensors(model)]
    before = fingerprint(model)
    layer.train()
    assert layer.weight.SCB is not None
    layer(torch.ones(1, layer.in_features))
    assert layer.weight.SCB is None
    assert ([name for name, _ in frozen_tensors(model)], fingerprint(model)) == (names, before)


def mixed_word(word: int) -> int:
    """SplitMix64's finaliser in whole numbers, and one more reversible shift."""
    for bits, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        word = (word ^ word >> bits) * factor % MODULO
    return word


def words_of(data: bytes, block_words: int) -> list[int]:
    """What a mixer is to make of bytes, in whole numbers."""
    found = []
    for start in range(0, len(data), 8 * block_words):
        block = data[start : start + 8 * block_words]
        parts = (int.from_bytes(block[at : at + 8].ljust(8, b"\0"), "little") for at in range(0, len(block), 8))
        found.append(sum(mixed_word(word ^ mixed_word(place)) for place, word in enumerate(parts)) % MODULO)
    return found


@given(data=st.binary(max_size=200), skipped=st.integers(0, 9), block_words=st.integers(1, 6))
def test_a_mixer_computes_its_formula_in_blocks_wherever_the_bytes_begin(
    data: bytes, skipped: int, block_words: int
) -> None:
    mixer = BlockMixer(CPU, block_words)
    tensor = torch.tensor([*bytes(skipped), *data], dtype=torch.uint8)[skipped:]
    # What lay in its memory before does not count.
    mixer.words(torch.full((3,), 0.7))
    assert [word % MODULO for word in mixer.words(tensor).tolist()] == words_of(data, block_words)


@given(data=st.binary(min_size=1, max_size=120), change=st.data(), block_words=st.integers(1, 6))
def test_a_changed_word_always_changes_the_words(data: bytes, change: Any, block_words: int) -> None:
    mixer = BlockMixer(CPU, block_words)
    tensor = torch.tensor([*data], dtype=torch.uint8)
    before = mixer.words(tensor)
    start = 8 * change.draw(st.integers(0, (len(data) - 1) // 8))
    part = data[start : start + 8]
    other = change.draw(st.binary(min_size=len(part), max_size=len(part)).filter(lambda found: found != part))
    tensor[start : start + len(part)] = torch.tensor([*other], dtype=torch.uint8)
    assert not torch.equal(mixer.words(tensor), before)


def test_a_tensor_is_read_in_its_own_order_whatever_its_strides() -> None:
    mixer, numbers = BlockMixer(CPU, 4), torch.arange(30, dtype=torch.int16).view(5, 6)
    assert torch.equal(mixer.words(numbers.T), mixer.words(numbers.T.contiguous()))
    assert not torch.equal(mixer.words(numbers.T), mixer.words(numbers))
    assert mixer.words(torch.empty(0)).shape == (0,)
