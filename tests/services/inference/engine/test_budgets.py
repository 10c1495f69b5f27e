"""What a decode step asks of a GPU at real shapes, counted without one: launches and reads by the host.

More than what is written here is a step that became slower on a card: measure there before raising a number.
"""

from collections.abc import Callable

import pytest
import torch

from benchmarks.launches import GREEDY, ROWS, SHAPES, Reads, decode
from services.inference.engine.interface import Event, Finished, GenerationRequest, Sampling, Token
from services.inference.engine.sampling import Chooser, choose
from tests.services.inference.harness import EngineUnderTest, Heard

# Of a layer, around the layers, of choosing the tokens.
LAUNCHES = {"base": (15, 13, 6), "one adapter": (17, 13, 6), "four adapters": (17, 13, 6)}
SLOTS = {"base": [0], "one adapter": [1], "four adapters": [1, 2, 3, 4]}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adapters", SLOTS)
def test_a_greedy_decode_step_stays_within_its_launches_and_its_one_read(shape: str, adapters: str) -> None:
    slots = (SLOTS[adapters] * ROWS)[:ROWS]
    cost = decode(SHAPES[shape], slots, [GREEDY] * ROWS)
    assert cost.reads == 1
    layer, around, choice = LAUNCHES[adapters]
    assert cost.layer <= layer
    assert cost.around <= around
    assert cost.choice <= choice


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([(Sampling(), 0)], 1),
        ([(Sampling(), 0), (Sampling(logit_bias=((3, 5.0),)), 0)], 2),
        ([(Sampling(), 0), (Sampling(do_sample=True, top_p=0.9, seed=1), 0)], 3),
        ([(Sampling(), 3)], 2),
        ([(Sampling(do_sample=True, seed=1), 3), (Sampling(), 5)], 5),
    ],
)
def test_how_often_a_choice_reads_depends_on_what_rows_ask_for_and_not_on_how_many_there_are(
    kinds: list[tuple[Sampling, int]], expected: int, rows: int
) -> None:
    choosers = [
        Chooser(sampling, torch.Generator().manual_seed(row) if sampling.do_sample else None, (), alternatives)
        for row in range(rows)
        for sampling, alternatives in kinds
    ]
    with Reads() as reads:
        choose(torch.randn(len(choosers), 40), choosers)
    assert reads.count == expected


def test_the_engines_step_adds_no_read_of_its_own(engine: Callable[..., EngineUnderTest]) -> None:
    """Counted on the engine's thread, where events are heard: a mode holds for the thread that enters it."""
    under_test, reads, counts = engine(), Reads(), list[int]()

    def on_event(event: Event) -> None:
        if isinstance(event, Token):
            if counts:
                counts.append(reads.count)
            else:
                reads.__enter__()  # type: ignore[no-untyped-call]
                counts.append(0)
        elif isinstance(event, Finished):
            reads.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    heard = Heard(on_event)
    request = GenerationRequest(under_test.prompt("def f(x):"), max_new_tokens=8, ignore_eos=True)
    under_test.engine.submit(request, heard)
    assert isinstance(heard.last, Finished)
    assert counts == list(range(8))
