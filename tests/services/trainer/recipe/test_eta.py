"""How long the rest will take."""

from services.trainer.recipe.eta import STEP_TOKENS, Pace


def test_nothing_is_said_before_the_first_step() -> None:
    assert Pace().seconds_for(100, 1) is None


def test_steps_weigh_by_their_tokens_and_a_little_by_themselves() -> None:
    pace = Pace()
    pace.add(1000, (1000 + STEP_TOKENS) * 0.01)
    assert round(pace.seconds_for(1000, 1) or 0, 6) == round((1000 + STEP_TOKENS) * 0.01, 6)
    pace.add(200, (200 + STEP_TOKENS) * 0.01)
    left = pace.seconds_for(3000, 30)
    assert left is not None
    assert round(left, 6) == round((3000 + 30 * STEP_TOKENS) * 0.01, 6)
    assert pace.seconds_for(0, 0) == 0


def test_the_first_step_after_loading_counts_only_until_there_is_another() -> None:
    pace = Pace(cold=True)
    pace.add(100, 9.0)
    assert pace.seconds_for(100, 1) == 9.0
    pace.add(100, 1.0)
    assert pace.seconds_for(100, 1) == 1.0
    pace.add(100, 2.0)
    assert pace.seconds_for(100, 1) == 1.5
