"""What a training step asks of a GPU at real shapes, counted without one: launches, reads, bytes kept for each token.

More than what is written here is a step that became slower or larger on a card: measure there before raising a number.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from benchmarks.launches import SHAPES, Launches, Reads, training
from services.trainer.model.frozen import _onednn_multiplies
from shared.jobs.spec import PRESETS

# Of a layer forwards, backwards, and around the layers. The same for both shapes: nothing is computed for each head.
LAUNCHES = {
    ("reference", "bf16"): (54, 57, 76),
    ("reference", "int8"): (64, 68, 76),
    ("recommended", "bf16"): (63, 77, 140),
    ("recommended", "int8"): (72, 88, 140),
}
MEGABYTES = {
    ("tinyllama", "reference"): 1.0,
    ("tinyllama", "recommended"): 0.91,
    ("llama-3-8b", "reference"): 3.3,
    ("llama-3-8b", "recommended"): 3.05,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("preset", "held"), LAUNCHES)
def test_a_training_step_stays_within_its_launches_its_one_read_and_its_bytes(
    shape: str, preset: str, held: str
) -> None:
    cost = training(SHAPES[shape], PRESETS[preset].lora, held)
    forward, backward, around = LAUNCHES[preset, held]
    assert cost.reads == 1
    assert cost.forward <= forward
    assert cost.backward <= backward
    assert cost.around <= around
    assert cost.kept <= 1e6 * MEGABYTES[shape, preset]


def test_counting_asks_no_kernel_of_this_processor_and_so_leaves_no_answer_behind() -> None:
    _onednn_multiplies.cache_clear()
    training(SHAPES["tinyllama"], PRESETS["reference"].lora)
    assert _onednn_multiplies.cache_info().currsize == 0


def test_views_and_allocations_launch_nothing_and_changes_in_place_do() -> None:
    with FakeTensorMode(), Launches() as launches:
        x = torch.empty(4, 6)
        x.view(6, 4).chunk(2)[0].T.detach()
        assert launches.total == 0
        x.add_(1)
        torch.mul(x, x, out=x)
        assert launches.calls == {"add_.Tensor": 1, "mul.out": 1}


def test_each_tensor_that_is_read_counts_once_however_many_numbers_it_has() -> None:
    for tensors in (torch.ones(3, 2), torch.ones(3, 2, device="meta")):
        with Reads() as reads:
            assert tensors.tolist() == [[1.0, 1.0]] * 3
            assert float(tensors[0, 0]) == float(tensors[1, 1]) == 1.0
        assert reads.count == 3
    with FakeTensorMode():
        fake = torch.ones(3)
        with Reads() as reads:
            assert fake.tolist() == [1.0] * 3
            assert fake[0].item() + fake[1].item() == 2.0
        assert reads.count == 3
        with pytest.raises(DataDependentOutputException):
            fake.tolist()
