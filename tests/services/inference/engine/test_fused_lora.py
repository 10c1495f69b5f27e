"""The fused LoRA against its definition, through any history of loads and batches."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.engine.fused_lora import FusedLora, FusedStack, Part, add_delta
from services.inference.engine.lora import LoraWeights

SLOTS, ROWS, WIDTH = 3, 4, 5
PARTS = (Part("q", 0, 6), Part("k", 6, 2), Part("v", 8, 3))

loads = st.tuples(
    st.integers(1, SLOTS), st.integers(1, 20), st.sets(st.sampled_from(["q", "k", "v", "o"]), min_size=1), st.integers()
)
batches = st.lists(st.integers(0, SLOTS), min_size=1, max_size=ROWS)


def adapter(rank: int, targets: set[str], seed: int) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed % 2**32)
    sizes = {"q": 6, "k": 2, "v": 3, "o": 7}
    return LoraWeights(
        rank=rank,
        pairs={
            path: (
                torch.randn(rank, WIDTH, generator=generator),
                torch.randn(sizes[path], rank, generator=generator),
            )
            for path in sorted(targets)
        },
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(loads | batches, max_size=25))
def test_every_row_gets_its_own_adapter_whatever_came_before(
    history: list[tuple[int, int, set[str], int] | list[int]],
) -> None:
    stacks = [
        FusedStack(PARTS, WIDTH, slots=SLOTS, rows=ROWS),
        FusedStack((Part("o", 0, 7),), WIDTH, slots=SLOTS, rows=ROWS),
    ]
    lora = FusedLora(stacks, slots=SLOTS, rows=ROWS, dtype=torch.float32, device=torch.device("cpu"))
    assert lora.modules == {"q": (WIDTH, 6), "k": (WIDTH, 2), "v": (WIDTH, 3), "o": (WIDTH, 7)}
    held: dict[int, LoraWeights] = {}
    for event in history:
        if isinstance(event, tuple):
            slot, rank, targets, seed = event
            held[slot] = adapter(rank, targets, seed)
            lora.write(slot, held[slot])
            continue
        x = torch.randn(len(event), WIDTH)
        for stack, delta in zip(stacks, lora.choose(event), strict=True):
            y = torch.randn(len(event), stack.out_features)
            expected = y.clone()
            for row, slot in enumerate(event):
                for part in stack.parts:
                    if slot in held and part.path in held[slot].pairs:
                        a, b = held[slot].pairs[part.path]
                        expected[row, part.start : part.start + part.size] += b @ (a @ x[row])
            torch.testing.assert_close(add_delta(y, x, delta), expected, atol=1e-4, rtol=1e-4)


@given(st.integers(1, 6), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5))
def test_in_one_buffer_it_is_the_same_adapter(rank: int, layers: list[tuple[int, int]]) -> None:
    pairs = {
        f"layer {n}": (torch.randn(rank, fan_in), torch.randn(out, rank)) for n, (fan_in, out) in enumerate(layers)
    }
    weights = LoraWeights(rank, pairs)
    buffer = torch.full((weights.nbytes // 4,), torch.nan)
    moved = weights.within(buffer)
    # No gap, and nothing beyond.
    assert not buffer.isnan().any()
    assert (moved.rank, moved.nbytes, list(moved.pairs)) == (rank, weights.nbytes, list(pairs))
    for path, (a, b) in moved.pairs.items():
        assert torch.equal(a, pairs[path][0])
        assert torch.equal(b, pairs[path][1])
        assert {a.untyped_storage().data_ptr(), b.untyped_storage().data_ptr()} == {buffer.data_ptr()}
        assert a.is_contiguous()
        assert b.T.is_contiguous()
