"""Pages of several inference processes as one: nothing is lost, and each series says where it is from."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from services.gateway.inference.scrape import merged

LABEL = st.text(max_size=12).filter(lambda text: text.isprintable())


def page(counts: dict[str, int], seconds: list[float]) -> str:
    registry = CollectorRegistry()
    counter = Counter("a_requests", "Requests.", ["route"], registry=registry)
    for route, count in counts.items():
        counter.labels(route).inc(count)
    histogram = Histogram("a_seconds", "Time.", registry=registry)
    for each in seconds:
        histogram.observe(each)
    return generate_latest(registry).decode()


def series(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@given(
    st.lists(
        st.tuples(st.dictionaries(LABEL, st.integers(0, 99), max_size=3), st.lists(st.floats(0, 99), max_size=3)),
        max_size=3,
    )
)
def test_every_series_of_every_process_is_there_once(processes: list[tuple[dict[str, int], list[float]]]) -> None:
    pages = {str(number): page(*each) for number, each in enumerate(processes)}
    text = merged(pages).decode()
    expected = {
        (name, labels | {("replica", replica)}): value
        for replica, each in pages.items()
        for (name, labels), value in series(each).items()
    }
    assert series(text) == expected
    # Prometheus refuses a page that names a family twice.
    types = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(types) == len(set(types))
