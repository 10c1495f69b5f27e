"""The ETA from the throughput so far."""

from services.trainer.recipe.eta import STEP_TOKENS, Throughput


def test_nothing_is_said_before_the_first_step() -> None:
    assert Throughput().seconds_for(100, 1) is None


def test_steps_weigh_by_their_tokens_and_a_little_by_themselves() -> None:
    throughput = Throughput()
    throughput.add(1000, (1000 + STEP_TOKENS) * 0.01)
    assert round(throughput.seconds_for(1000, 1) or 0, 6) == round((1000 + STEP_TOKENS) * 0.01, 6)
    throughput.add(200, (200 + STEP_TOKENS) * 0.01)
    left = throughput.seconds_for(3000, 30)
    assert left is not None
    assert round(left, 6) == round((3000 + 30 * STEP_TOKENS) * 0.01, 6)
    assert throughput.seconds_for(0, 0) == 0


def test_the_first_step_after_loading_counts_only_until_there_is_another() -> None:
    throughput = Throughput(cold=True)
    throughput.add(100, 9.0)
    assert throughput.seconds_for(100, 1) == 9.0
    throughput.add(100, 1.0)
    assert throughput.seconds_for(100, 1) == 1.0
    throughput.add(100, 2.0)
    assert throughput.seconds_for(100, 1) == 1.5
