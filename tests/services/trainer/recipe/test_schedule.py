import pytest
import torch
from transformers import get_scheduler

from services.trainer.recipe.schedule import learning_rate
from shared.jobs.spec import Hyperparameters, Scheduler


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_without_warm_up_it_is_transformers_schedule(name: Scheduler) -> None:
    hyper = Hyperparameters(scheduler=name, learning_rate=0.3)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    oracle = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=17)
    for step in range(17):
        assert learning_rate(step, 17, hyper) == pytest.approx(oracle.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        oracle.step()


def test_warm_up_rises_from_above_zero_to_the_peak() -> None:
    hyper = Hyperparameters(scheduler="cosine", learning_rate=0.3, warmup_ratio=0.25)
    rates = [learning_rate(step, 20, hyper) for step in range(20)]
    assert rates[:6] == sorted(rates[:6])
    assert rates[0] > 0
    assert max(rates) == rates[5] == 0.3
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_even_a_single_warm_step_learns() -> None:
    assert learning_rate(0, 1, Hyperparameters(warmup_ratio=0.03)) > 0
