"""From logits to tokens: greedy rows together, rows that ask for more together too, each with its own generator.

The processors are transformers' where it has them, OpenAI's penalties and bias where it has not.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from services.inference.engine.interface import Alternative, Constraint, Sampling
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
        generated: output id → how often it was generated, for the frequency and presence penalties.
        constraint: of the row's grammar, if it has one.
    """

    sampling: Sampling
    generator: torch.Generator | None
    seen: Collection[int]
    alternatives: int = 0
    generated: Mapping[int, int] | None = None
    constraint: Constraint | None = None

    @property
    def plain(self) -> bool:
        """Whether it is the largest score that wins, as the model gave it."""
        return self.sampling.plain and self.constraint is None


def choose(logits: torch.Tensor, choosers: Sequence[Chooser]) -> list[Choice | Exception]:
    """One token per row of fp32 `logits` [rows, vocabulary], or why there is none: each row fails alone.

    Greedy rows are read once, all together; those that sample add two reads, other processed ones one, and so does each
    number of alternatives that is asked for: on a GPU each read waits for everything that was asked of it before.
    """
    best = logits.argmax(dim=-1)
    normalisers, scores, greedy = _read(torch.logsumexp(logits, dim=-1), logits.amax(dim=-1), best)
    asking = [row for row, normaliser in enumerate(normalisers) if math.isfinite(normaliser)]
    asking = [row for row in asking if not choosers[row].plain]
    chosen = dict(zip(asking, _chosen(logits, choosers, asking), strict=True))
    alternatives = _alternatives(logits, normalisers, choosers)
    choices: list[Choice | Exception] = []
    for row in range(len(choosers)):
        if not math.isfinite(normalisers[row]):
            choices.append(TunesmithError("the model gave no finite scores", code="non_finite"))
            continue
        found = chosen.get(row, (int(greedy[row]), scores[row]))
        if isinstance(found, Exception):
            choices.append(found)
            continue
        token, score = found
        choices.append(Choice(token, score - normalisers[row], alternatives.get(row, ())))
    return choices


def _read(*columns: torch.Tensor) -> list[list[Any]]:
    """Several tensors of one shape in one read; float64 holds fp32 and every token id exactly."""
    read: list[list[Any]] = torch.stack([column.double() for column in columns]).tolist()
    return read


def _chosen(
    logits: torch.Tensor, choosers: Sequence[Chooser], rows: Sequence[int]
) -> list[tuple[int, float] | Exception]:
    """The tokens of rows that are not plain, and what the model gave them, in the order of `rows`."""
    if not rows:
        return []
    own = [choosers[row] for row in rows]
    try:
        # Indices make a copy of the rows.
        scores = processed(logits[list(rows)], own)
    except Exception as error:
        if len(rows) == 1:
            return [error]
        return [_chosen(logits, choosers, [row])[0] for row in rows]
    tokens, allowed = _drawn(scores, own)
    return [
        (int(token), score) if ok else TunesmithError("no token is allowed", code="generation_failed")
        for token, ok, score in zip(*_read(tokens, allowed, logits[list(rows), tokens]), strict=True)
    ]


def _drawn(scores: torch.Tensor, choosers: Sequence[Chooser]) -> tuple[torch.Tensor, torch.Tensor]:
    """A token per row of `scores` [rows, vocabulary], which are as `processed` returns them, and whether it may be."""
    tokens = scores.argmax(dim=-1)
    allowed = scores.gather(1, tokens[:, None])[:, 0].isfinite()
    if not any(chooser.sampling.do_sample for chooser in choosers):
        return tokens, allowed
    # A generator moves on only where there is something to draw, so that no row's failure shows in another's text.
    sampled = [row for row, ok in enumerate(allowed.tolist()) if ok and choosers[row].sampling.do_sample]
    if sampled:
        tokens[sampled] = _draw(scores[sampled].softmax(-1), [choosers[row].generator for row in sampled])
    return tokens, allowed


def _draw(shares: torch.Tensor, generators: Sequence[torch.Generator | None]) -> torch.Tensor:
    """A token of each row of `shares` [rows, vocabulary], by the row's own generator.

    It is the one `torch.multinomial` draws, which reads twice for each row: the largest share per exponential wait.
    """
    waits = torch.empty_like(shares)
    for row, generator in zip(waits, generators, strict=True):
        row.exponential_(generator=generator)
    return (shares / waits).argmax(dim=-1)


def processed(scores: torch.Tensor, choosers: Sequence[Chooser]) -> torch.Tensor:
    """The scores that rows choose from: [rows, vocabulary], changed in place, -inf where a token is ruled out.

    Every stage computes the rows that ask for it, all at once, and leaves the others as they are.

    Raises:
        IndexError: a token id is outside the vocabulary.
        InvalidRequest: a grammar failed.
    """
    samplings = [chooser.sampling for chooser in choosers]
    _repetition_penalty(scores, choosers)
    _additions(scores, choosers)
    _constraints(scores, choosers)
    sampled = [row for row, sampling in enumerate(samplings) if sampling.do_sample]
    if sampled:
        temperatures = _column([samplings[row].temperature for row in sampled], scores)
        scores[sampled] = scores[sampled] / temperatures
    for row in sampled:
        top_k = samplings[row].top_k
        if top_k is not None and top_k < scores.shape[1]:
            scores[row].masked_fill_(scores[row] < scores[row].topk(top_k).values[-1], float("-inf"))
    limits: tuple[tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], list[float | None]], ...] = (
        (_top_p, [each.top_p if each.top_p != 1 else None for each in samplings]),
        (_min_p, [each.min_p or None for each in samplings]),
        (_typical_p, [each.typical_p if each.typical_p != 1 else None for each in samplings]),
    )
    for stage, limit in limits:
        rows = [row for row in sampled if limit[row] is not None]
        if rows:
            asked = scores[rows]
            dropped = stage(asked, _column([limit[row] for row in rows], scores))
            scores[rows] = asked.masked_fill(dropped, float("-inf"))
    return scores


def _column(values: Sequence[float | None], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _repetition_penalty(scores: torch.Tensor, choosers: Sequence[Chooser]) -> None:
    rows: list[int] = []
    ids: list[int] = []
    penalties: list[float] = []
    for row, chooser in enumerate(choosers):
        if chooser.sampling.repetition_penalty != 1:
            distinct = set(chooser.seen)
            rows += [row] * len(distinct)
            ids += distinct
            penalties += [chooser.sampling.repetition_penalty] * len(distinct)
    if ids:
        where = torch.tensor(rows, device=scores.device), torch.tensor(ids, device=scores.device)
        present, penalty = scores[where], torch.tensor(penalties, dtype=scores.dtype, device=scores.device)
        scores[where] = torch.where(present < 0, present * penalty, present / penalty)


def _additions(scores: torch.Tensor, choosers: Sequence[Chooser]) -> None:
    rows: list[int] = []
    ids: list[int] = []
    amounts: list[float] = []
    for row, chooser in enumerate(choosers):
        sampling = chooser.sampling
        added = dict(sampling.logit_bias)
        if sampling.counts_output:
            for token, count in (chooser.generated or {}).items():
                penalty = count * sampling.frequency_penalty + sampling.presence_penalty
                added[token] = added.get(token, 0.0) - penalty
        rows += [row] * len(added)
        ids += added
        amounts += added.values()
    if ids:
        where = torch.tensor(rows, device=scores.device), torch.tensor(ids, device=scores.device)
        scores[where] += torch.tensor(amounts, dtype=scores.dtype, device=scores.device)


def _constraints(scores: torch.Tensor, choosers: Sequence[Chooser]) -> None:
    for row, chooser in enumerate(choosers):
        if chooser.constraint is not None:
            allowed = torch.from_numpy(chooser.constraint.allowed()).to(scores.device)
            scores[row].masked_fill_(~allowed, float("-inf"))


def _top_p(scores: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """What is outside the nucleus [rows, vocabulary]; `mass` is [rows, 1]."""
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    # A token is kept while those before it have less than top_p together; the first is always kept.
    dropped = probabilities.cumsum(-1) - probabilities >= mass
    dropped[:, 0] = False
    return torch.zeros_like(dropped).scatter_(1, order, dropped)


def _min_p(scores: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """What is less likely than `share` [rows, 1] of the likeliest."""
    probabilities = scores.softmax(-1)
    return probabilities < share * probabilities.amax(dim=-1, keepdim=True)


def _typical_p(scores: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """What is outside the locally typical set: tokens are taken by how near their surprise is to the entropy.

    As transformers' `TypicalLogitsWarper` (Meister et al., arXiv 2202.00666).
    """
    logprobs = scores.log_softmax(-1)
    entropy = -(logprobs * logprobs.exp()).nansum(-1, keepdim=True)
    ordered, order = (-logprobs - entropy).abs().sort(dim=-1, stable=True)
    reached = scores.gather(1, order).softmax(-1).cumsum(-1) < mass
    last = reached.sum(dim=1, keepdim=True).clamp(max=scores.shape[1] - 1)
    dropped = ordered > ordered.gather(1, last)
    return torch.zeros_like(dropped).scatter_(1, order, dropped)


def likeliest(logprobs: torch.Tensor, count: int) -> list[tuple[Alternative, ...]]:
    """The `count` likeliest tokens of each row of log probabilities [rows, vocabulary], the likeliest first."""
    top = logprobs.topk(min(count, logprobs.shape[1]), dim=-1)
    return [
        tuple(Alternative(token, value) for token, value in zip(ids, values, strict=True))
        for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _alternatives(
    logits: torch.Tensor, normalisers: Sequence[float], choosers: Sequence[Chooser]
) -> dict[int, tuple[Alternative, ...]]:
    """The likeliest tokens of the rows that ask for some; rows that ask for as many are read together."""
    rows_by_count: dict[int, list[int]] = defaultdict(list)
    for row, chooser in enumerate(choosers):
        if chooser.alternatives and math.isfinite(normalisers[row]):
            rows_by_count[min(chooser.alternatives, logits.shape[1])].append(row)
    found: dict[int, tuple[Alternative, ...]] = {}
    for count, rows in rows_by_count.items():
        top = logits[rows].topk(count, dim=-1)
        for row, ids, values in zip(rows, *_read(top.indices, top.values), strict=True):
            found[row] = tuple(
                Alternative(int(token), value - normalisers[row]) for token, value in zip(ids, values, strict=True)
            )
    return found
