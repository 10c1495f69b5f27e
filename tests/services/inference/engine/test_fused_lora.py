"""The fused LoRA against its definition, through any history of loads and batches, and through lack of memory."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.engine.cache import lazy_zeros
from services.inference.engine.fused_lora import FusedLora, Part, Product, add_delta
from services.inference.engine.lora import LoraWeights

SLOTS, ROWS, WIDTH = 3, 4, 5
PRODUCTS = (
    Product((Part("q", 0, 6), Part("k", 6, 2), Part("v", 8, 3)), WIDTH),
    Product((Part("o", 0, 7),), WIDTH),
)
SIZES = {"q": 6, "k": 2, "v": 3, "o": 7}

loads = st.tuples(st.integers(1, SLOTS), st.integers(1, 20), st.sets(st.sampled_from(list(SIZES)), min_size=1))
frees = st.integers(1, SLOTS)
batches = st.lists(st.integers(0, SLOTS), min_size=1, max_size=ROWS)
histories = st.lists(loads | frees | batches, max_size=25)


def adapter(rank: int, targets: set[str], seed: int) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        path: (torch.randn(rank, WIDTH, generator=generator), torch.randn(SIZES[path], rank, generator=generator))
        for path in sorted(targets)
    }
    return LoraWeights(rank=rank, pairs=pairs)


class UnderTest:
    """A `FusedLora` and what its slots must hold."""

    def __init__(self) -> None:
        self.lora = FusedLora(PRODUCTS, slots=SLOTS, rows=ROWS, dtype=torch.float32, device=torch.device("cpu"))
        self.held: dict[int, LoraWeights] = {}

    def load(self, slot: int, weights: LoraWeights) -> None:
        self.lora.write(slot, self.lora.prepare(weights))
        self.held[slot] = weights

    def free(self, slot: int) -> None:
        self.lora.free(slot)
        self.held.pop(slot, None)

    def check(self, batch: list[int]) -> None:
        x = torch.randn(len(batch), WIDTH)
        for product, delta in zip(PRODUCTS, self.lora.choose(batch), strict=True):
            y = torch.randn(len(batch), product.out_features)
            expected = y.clone()
            for row, slot in enumerate(batch):
                for part in product.parts:
                    if slot in self.held and part.path in self.held[slot].pairs:
                        a, b = self.held[slot].pairs[part.path]
                        expected[row, part.start : part.start + part.size] += b @ (a @ x[row])
            torch.testing.assert_close(add_delta(y, x, delta), expected, atol=1e-4, rtol=1e-4)

    def play(self, history: list[Any]) -> None:
        for number, event in enumerate(history):
            if isinstance(event, tuple):
                slot, rank, targets = event
                self.load(slot, adapter(rank, targets, seed=number))
            elif isinstance(event, int):
                self.free(event)
            else:
                self.check(event)


@settings(max_examples=60, deadline=None)
@given(histories)
def test_every_row_gets_its_own_adapter_whatever_came_before(history: list[Any]) -> None:
    under_test = UnderTest()
    assert under_test.lora.modules == {path: (WIDTH, size) for path, size in SIZES.items()}
    under_test.play(history)


@settings(max_examples=60, deadline=None)
@given(histories, loads, st.integers(0, 5), batches)
def test_what_finds_no_memory_changes_nothing(history: list[Any], load: Any, room: int, batch: list[int]) -> None:
    under_test = UnderTest()
    under_test.play(history)
    slot, rank, targets = load
    prepared = under_test.lora.prepare(adapter(rank, targets, seed=99))
    left = iter(range(room))
    real = lazy_zeros

    def short_of_memory(*arguments: Any) -> torch.Tensor:
        # A MOCK of a device with room for so many more tensors.
        if next(left, None) is None:
            raise torch.OutOfMemoryError("no memory")
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("services.inference.engine.fused_lora.lazy_zeros", short_of_memory)
        try:
            under_test.lora.write(slot, prepared)
        except torch.OutOfMemoryError:
            pass
        else:
            under_test.held[slot] = adapter(rank, targets, seed=99)
    under_test.check(batch)


def test_an_adapter_takes_what_its_own_rank_needs_and_rows_what_the_largest_needs() -> None:
    under_test = UnderTest()
    lora = under_test.lora
    small, large = adapter(2, {"o"}, seed=1), adapter(20, {"q", "v"}, seed=2)
    # B of a part is zero in the columns of the others.
    assert lora.prepare(small).nbytes == 4 * 2 * (WIDTH + 7)
    assert lora.prepare(large).nbytes == 4 * 40 * (WIDTH + 11)
    under_test.load(1, small)
    assert [copies.rank for copies in lora._copies] == [0, 8]
    under_test.load(2, large)
    assert [copies.rank for copies in lora._copies] == [64, 8]
    under_test.free(2)
    under_test.load(3, small)
    assert [copies.rank for copies in lora._copies] == [0, 8]
