"""From logits to tokens: greedy rows together, sampled rows one by one, each with its own generator.

The processors are transformers' (repetition penalty, temperature, top_k, top_p), in its order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from services.inference.engine.interface import Alternative, Sampling
from shared.errors import TunesmithError


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token with its log probability under the unprocessed distribution."""

    id: int
    logprob: float
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True)
class Chooser:
    """How one row chooses.

    Attributes:
        generator: on the logits' device; None for greedy rows.
        seen: prompt and output ids, for the repetition penalty.
    """

    sampling: Sampling
    generator: torch.Generator | None
    seen: Sequence[int]
    alternatives: int = 0


def choose(logits: torch.Tensor, choosers: Sequence[Chooser]) -> list[Choice | Exception]:
    """One token per row of fp32 `logits` [rows, vocabulary], or why there is none: each row fails alone."""
    greedy = logits.argmax(dim=-1).tolist()
    # Two reads for all rows: on a GPU each waits for everything that was asked of it before.
    normalisers, best = torch.stack((torch.logsumexp(logits, dim=-1), logits.amax(dim=-1))).tolist()
    choices: list[Choice | Exception] = []
    for row, chooser in enumerate(choosers):
        if not math.isfinite(normalisers[row]):
            choices.append(TunesmithError("the model gave no finite scores", code="non_finite"))
            continue
        plain = not chooser.sampling.do_sample and chooser.sampling.repetition_penalty == 1
        try:
            token = greedy[row] if plain else _choose_one(logits[row], chooser)
        except Exception as error:
            choices.append(error)
            continue
        logprob = (best[row] if plain else float(logits[row, token])) - normalisers[row]
        choices.append(Choice(token, logprob, _alternatives(logits[row], normalisers[row], chooser.alternatives)))
    return choices


def _choose_one(logits: torch.Tensor, chooser: Chooser) -> int:
    scores = processed(logits, chooser.sampling, chooser.seen)
    if not chooser.sampling.do_sample:
        return int(scores.argmax())
    return int(torch.multinomial(scores.softmax(-1), 1, generator=chooser.generator))


def processed(logits: torch.Tensor, sampling: Sampling, seen: Sequence[int]) -> torch.Tensor:
    """The scores a row samples from: [vocabulary] → [vocabulary], -inf where a token is ruled out."""
    scores = logits.clone()
    if sampling.repetition_penalty != 1:
        ids = torch.tensor(sorted(set(seen)), device=scores.device)
        present, penalty = scores[ids], sampling.repetition_penalty
        scores[ids] = torch.where(present < 0, present * penalty, present / penalty)
    if not sampling.do_sample:
        return scores
    scores = scores / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.numel():
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = scores.sort(descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        # A token is kept while those before it have less than top_p together; the first is always kept.
        dropped = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        dropped[0] = False
        scores = scores.masked_fill(torch.zeros_like(dropped).scatter_(0, order, dropped), float("-inf"))
    return scores


def _alternatives(logits: torch.Tensor, normaliser: float, count: int) -> tuple[Alternative, ...]:
    if not count:
        return ()
    top = logits.topk(min(count, logits.numel()))
    return tuple(
        Alternative(token, value - normaliser)
        for token, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    )
