"""Two operations at once come to what one of their two orders comes to.

Here a fixed share of the pairs; `benchmarks.faults` takes every one.
"""

import itertools
from collections.abc import Iterator

import pytest

from tests.faults.pairs import OPERATIONS, STATES, Pairs
from tests.fresh_database import fresh_on_server

pytestmark = pytest.mark.slow
# Prime to the number of operations: in the end each is with each other's neighbours.
EVERY = 41
SHARE = list(itertools.product(STATES, OPERATIONS, OPERATIONS))[::EVERY]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def pairs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pairs]:
    folder = tmp_path_factory.mktemp("pairs")
    url = f"sqlite:///{folder / 'tunesmith.db'}"
    if request.param == "postgresql":
        url = fresh_on_server(request.getfixturevalue("postgres_url"))
    pairs = Pairs(url, folder)
    yield pairs
    pairs.close()


def test_two_at_once_come_to_what_one_of_their_orders_comes_to(pairs: Pairs) -> None:
    found = {}
    done = 0
    for state, first, second in SHARE:
        for at, wrong in pairs.interleavings(state, first, second):
            done += 1
            if wrong:
                found[f"{first} stands at its step {at} while {second} runs; the job is {state.value}"] = wrong
    assert found == {}
    assert done > len(SHARE)
