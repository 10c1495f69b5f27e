"""Greedy texts do not depend on company: 200 tokens alone are 200 tokens in a full batch."""

from collections.abc import Callable

import pytest

from services.inference.engine.interface import Finished, Sampling
from tests.services.inference.harness import EngineUnderTest, Heard

MakeEngine = Callable[..., EngineUnderTest]
ROWS, TOKENS = 16, 200
PROMPT = "### Instruction:\nWhat does json.dumps do in Python?\n\n### Response:\n"


@pytest.mark.slow
def test_greedy_texts_are_the_same_alone_and_in_a_full_mixed_batch(engine: MakeEngine, adapters: list[str]) -> None:
    """Fifteen others of other lengths, adapters and ways to choose join and leave while each text is generated."""
    under_test = engine(rows=ROWS, context=512, chunk=64)
    for adapter in adapters:
        under_test.load(adapter)
    mine = [(served, under_test.prompt(PROMPT)) for served in (None, adapters[0], adapters[2])]

    def submit(served: str | None, prompt: list[int]) -> Heard:
        return under_test.submit(prompt, adapter=served, max_new_tokens=TOKENS, ignore_eos=True)

    def crowd(seed: int) -> list[Heard]:
        return [
            under_test.submit(
                under_test.prompt("The quick brown fox jumps over it. " * (place % 5) + "x" * (seed + place + 1)),
                adapter=(None, *adapters)[(seed + place) % 5],
                max_new_tokens=20 + 17 * place,
                sampling=Sampling(do_sample=place % 2 == 0, temperature=1.3, seed=place, presence_penalty=0.5),
                ignore_eos=True,
            )
            for place in range(ROWS - 1)
        ]

    alone: list[list[int]] = []
    for served, prompt in mine:
        heard = submit(served, prompt)
        assert isinstance(heard.last, Finished)
        alone.append(heard.ids)
    # The texts are long and their own: equality would prove nothing of two that repeat one token.
    assert all(len(ids) == TOKENS for ids in alone)
    assert len({tuple(ids) for ids in alone}) == len(alone)

    others: list[Heard] = []
    for place, (served, prompt) in enumerate(mine):
        if place % 2:
            others += crowd(place)
            together = submit(served, prompt)
        else:
            together = submit(served, prompt)
            together.begun.wait(60)
            others += crowd(place)
        assert isinstance(together.last, Finished)
        assert together.ids == alone[place], f"{served} says something else in company"
    assert all(isinstance(each.last, Finished) for each in others)
