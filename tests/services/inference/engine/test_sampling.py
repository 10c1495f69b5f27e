"""The processors against transformers' own where it has them, and against plain numpy where it has not."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from services.inference.engine.interface import Sampling
from services.inference.engine.sampling import Choice, Chooser, _draw, choose, likeliest, processed

VOCABULARY = 50
TOKENS = st.integers(0, VOCABULARY - 1)
SAMPLINGS = st.builds(
    Sampling,
    do_sample=st.booleans(),
    temperature=st.floats(0.1, 5),
    top_k=st.none() | st.integers(1, 60),
    top_p=st.none() | st.floats(0.05, 1),
    min_p=st.none() | st.floats(0, 1),
    typical_p=st.none() | st.floats(0.05, 1),
    repetition_penalty=st.just(1.0) | st.floats(0.5, 2),
    frequency_penalty=st.just(0.0) | st.floats(-2, 2),
    presence_penalty=st.just(0.0) | st.floats(-2, 2),
    logit_bias=st.dictionaries(TOKENS, st.floats(-100, 100), max_size=5).map(lambda bias: tuple(bias.items())),
    seed=st.integers(0, 1 << 62),
)


def random_logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def chooser(sampling: Sampling, prompt: list[int], output: list[int]) -> Chooser:
    """As the engine makes one for a row."""
    generator = torch.Generator().manual_seed(sampling.seed) if sampling.do_sample else None
    counts = {token: output.count(token) for token in output}
    return Chooser(sampling, generator, set(prompt + output), 2, counts)


def by_transformers(logits: torch.Tensor, sampling: Sampling, seen: list[int]) -> torch.Tensor:
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p is not None and sampling.typical_p < 1:
        processors.append(TypicalLogitsWarper(sampling.typical_p))
    scores: torch.Tensor = processors(torch.tensor([seen]), logits.clone())
    return scores


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.1, 5),
    penalty=st.floats(0.5, 2),
    cut=st.fixed_dictionaries({}, optional={"top_k": st.integers(1, 60)})
    | st.fixed_dictionaries({}, optional={"top_p": st.floats(0.05, 1)})
    | st.fixed_dictionaries({}, optional={"min_p": st.floats(0, 1)})
    | st.fixed_dictionaries({}, optional={"typical_p": st.floats(0.05, 0.99)}),
    seen=st.lists(TOKENS, min_size=1, max_size=10),
)
def test_scores_are_transformers(
    seed: int, temperature: float, penalty: float, cut: dict[str, Any], seen: list[int]
) -> None:
    logits = random_logits(seed)
    sampling = Sampling(True, temperature, repetition_penalty=penalty, **cut)
    expected = by_transformers(logits, sampling, seen).softmax(-1)
    ours = processed(logits.clone(), [Chooser(sampling, None, seen)]).softmax(-1)
    # A nucleus' border may fall between equal sums added in another order: compare what is certain.
    summed = "top_p" in cut or "typical_p" in cut
    kept, theirs = ours > 0, expected > 0
    assert int((kept != theirs).sum()) <= (1 if summed else 0)
    if bool((kept == theirs).all()):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_all_cuts_together_are_transformers() -> None:
    for seed in range(200):
        logits = random_logits(seed)
        sampling = Sampling(True, 1.3, 30, 0.9, 1.2, min_p=0.01, typical_p=0.8)
        expected = by_transformers(logits, sampling, [1, 2, 2]).softmax(-1)
        torch.testing.assert_close(processed(logits.clone(), [Chooser(sampling, None, [1, 2])]).softmax(-1), expected)


@given(
    seed=st.integers(0, 1000),
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
    bias=st.dictionaries(TOKENS, st.floats(-100, 100), max_size=8),
    prompt=st.lists(TOKENS, max_size=5),
    output=st.lists(TOKENS, max_size=30),
)
def test_penalties_and_bias_are_openais_definition(
    seed: int, frequency: float, presence: float, bias: dict[int, float], prompt: list[int], output: list[int]
) -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence + bias[j], c over what has been generated."""
    logits = random_logits(seed)
    counts = np.bincount(np.array(output, dtype=np.int64), minlength=VOCABULARY)
    expected = logits[0].double().numpy() - counts * frequency - (counts > 0) * presence
    for token, added in bias.items():
        expected[token] += added
    sampling = Sampling(frequency_penalty=frequency, presence_penalty=presence, logit_bias=tuple(bias.items()))
    [scores] = processed(logits.clone(), [chooser(sampling, prompt, output)])
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-4, atol=1e-4)


@given(
    seed=st.integers(0, 1000),
    samplings=st.lists(SAMPLINGS, min_size=2, max_size=8),
    prompt=st.lists(TOKENS, min_size=1, max_size=5),
    output=st.lists(TOKENS, max_size=10),
)
def test_a_row_chooses_the_same_alone_and_in_company(
    seed: int, samplings: list[Sampling], prompt: list[int], output: list[int]
) -> None:
    logits = random_logits(seed, len(samplings))
    together = choose(logits, [chooser(sampling, prompt, output) for sampling in samplings])
    alone = [choose(logits[[row]], [chooser(each, prompt, output)])[0] for row, each in enumerate(samplings)]
    assert [each.id for each in together if isinstance(each, Choice)] == [
        each.id for each in alone if isinstance(each, Choice)
    ]
    assert all(isinstance(each, Choice) for each in together)


def test_greedy_takes_the_largest_and_the_penalty_counts() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.5], [0.0, 2.0, 1.5], [1.0, float("nan"), 0.0], [float("inf"), 0.0, 0.0]])
    plain = Chooser(Sampling(), None, ())
    penalised = Chooser(Sampling(repetition_penalty=2.0), None, [1])
    choices = choose(logits, [plain, penalised, plain, plain])
    assert [choice.id if isinstance(choice, Choice) else None for choice in choices] == [1, 2, None, None]
    assert isinstance(choices[0], Choice)
    assert choices[0].logprob == pytest.approx(float(logits[0].log_softmax(-1)[1]))


def test_a_bias_of_100_bans_and_forces() -> None:
    logits = random_logits(3).repeat(3, 1)
    best = int(logits[0].argmax())
    other = (best + 1) % VOCABULARY
    banned = Sampling(logit_bias=((best, -100.0),))
    forced = Sampling(True, logit_bias=((other, 100.0),), seed=1)
    first, second, third = choose(logits, [chooser(each, [], []) for each in (Sampling(), banned, forced)])
    assert isinstance(first, Choice)
    assert isinstance(second, Choice)
    assert isinstance(third, Choice)
    assert first.id == best
    assert second.id == int(logits[0].topk(2).indices[1])
    assert third.id == other
    # What is reported is the model's own opinion, not what was made of it.
    assert third.logprob == pytest.approx(float(logits[0].log_softmax(-1)[other]), abs=1e-5)


def test_rows_that_ask_for_nothing_are_not_processed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def watched(logits: torch.Tensor, choosers: list[Chooser]) -> torch.Tensor:
        seen.append(len(choosers))
        return processed(logits, choosers)

    monkeypatch.setattr("services.inference.engine.sampling.processed", watched)
    plain, asking = Chooser(Sampling(), None, ()), Chooser(Sampling(logit_bias=((1, 1.0),)), None, ())
    choose(random_logits(1, 3), [plain] * 3)
    assert seen == []
    choose(random_logits(1, 3), [plain, asking, plain])
    assert seen == [1]


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    generator = torch.Generator().manual_seed(5)
    chooser = Chooser(Sampling(do_sample=True), generator, ())
    drawn = [choice.id for _ in range(4000) if isinstance(choice := choose(logits, [chooser])[0], Choice)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / len(drawn)
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.03, rtol=0)


@given(st.integers(0, 1 << 62), st.integers(1, 4), st.sampled_from([2, 50, 1000]))
def test_a_draw_is_the_one_torch_makes_with_the_same_generator(seed: int, rows: int, vocabulary: int) -> None:
    generators = [[torch.Generator().manual_seed(seed + row) for row in range(rows)] for _ in range(2)]
    shares = (torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3).softmax(-1)
    shares[:, 0] = 0
    for _ in range(3):
        expected = [
            torch.multinomial(share, 1, generator=each) for share, each in zip(shares, generators[0], strict=True)
        ]
        assert torch.equal(_draw(shares, generators[1]), torch.cat(expected))


def test_a_row_that_cannot_be_sampled_fails_alone() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    seen_outside = Chooser(Sampling(repetition_penalty=2.0), None, [99])
    seeded = Sampling(do_sample=True, seed=4)
    broken, whole, sampled = choose(logits, [seen_outside, Chooser(Sampling(), None, ()), chooser(seeded, [], [])])
    assert isinstance(broken, IndexError)
    assert isinstance(whole, Choice)
    assert choose(logits[:1], [chooser(seeded, [], [])]) == [sampled]


def test_the_likeliest_come_first() -> None:
    [row] = likeliest(torch.tensor([[-3.0, -1.0, -2.0]]), 2)
    assert [(each.id, each.logprob) for each in row] == [(1, -1.0), (2, -2.0)]
