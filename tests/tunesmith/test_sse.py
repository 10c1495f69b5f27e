from hypothesis import given
from hypothesis import strategies as st

from tunesmith.sse import data_of

LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]))


@given(st.lists(st.lists(LINES, min_size=1)), st.sampled_from(["\n", "\r\n"]), st.data())
def test_events_arrive_whole_however_they_are_cut(events: list[list[str]], end: str, data: st.DataObject) -> None:
    sent = ": hello\n\n"
    for lines in events:
        sent += "id: 7" + end + "".join(f"data: {line}{end}" for line in lines) + end
    raw = sent.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=5)))
    chunks = [raw[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    assert list(data_of(chunks)) == ["\n".join(lines) for lines in events]


def test_what_was_broken_off_is_no_event() -> None:
    assert list(data_of([b'data: {"a": 1}\n\ndata: {"a"'])) == ['{"a": 1}']
    assert list(data_of([b"data:x\n\nevent: y\n\n"])) == ["x"]
