"""The processors against transformers' own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from services.inference.engine.interface import Sampling
from services.inference.engine.sampling import Choice, Chooser, choose, processed

VOCABULARY = 50


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.1, 5),
    top_k=st.none() | st.integers(1, 60),
    top_p=st.none() | st.floats(0.05, 1),
    penalty=st.floats(0.5, 2),
    seen=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=10),
)
def test_scores_are_transformers(
    seed: int, temperature: float, top_k: int | None, top_p: float | None, penalty: float, seen: list[int]
) -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    expected = processors(torch.tensor([seen]), logits[None].clone())[0].softmax(-1)
    ours = processed(logits, Sampling(True, temperature, top_k, top_p, penalty), seen).softmax(-1)
    # The nucleus' border may fall between equal sums added in another order: compare what is certain.
    assert float((ours - expected).abs().max()) < 0.02 or top_p is not None
    kept, theirs = ours > 0, expected > 0
    assert int((kept != theirs).sum()) <= (1 if top_p is not None else 0)
    if bool((kept == theirs).all()):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_greedy_takes_the_largest_and_the_penalty_counts() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.5], [0.0, 2.0, 1.5], [1.0, float("nan"), 0.0], [float("inf"), 0.0, 0.0]])
    plain = Chooser(Sampling(), None, ())
    penalised = Chooser(Sampling(repetition_penalty=2.0), None, [1])
    choices = choose(logits, [plain, penalised, plain, plain])
    assert [choice.id if isinstance(choice, Choice) else None for choice in choices] == [1, 2, None, None]
    assert isinstance(choices[0], Choice)
    assert choices[0].logprob == pytest.approx(float(logits[0].log_softmax(-1)[1]))


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    generator = torch.Generator().manual_seed(5)
    chooser = Chooser(Sampling(do_sample=True), generator, ())
    drawn = [choice.id for _ in range(4000) if isinstance(choice := choose(logits, [chooser])[0], Choice)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / len(drawn)
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.03, rtol=0)


def test_a_row_that_cannot_be_sampled_fails_alone() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    seen_outside = Chooser(Sampling(repetition_penalty=2.0), None, [99])
    broken, whole = choose(logits, [seen_outside, Chooser(Sampling(), None, ())])
    assert isinstance(broken, IndexError)
    assert isinstance(whole, Choice)
