"""Which job or model a short name stands for."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tunesmith.fake_gateway import FakeGateway, job
from tests.tunesmith.test_cli import run
from tunesmith.names import FEWEST_DIGITS, Ambiguous, NothingYet, job_id, model_name

OLD, NEW, OTHER = (f"ftjob-{digits}{'0' * 16}" for digits in ("aaaa1111", "aaaa2222", "bbbb3333"))
MODELS: list[dict[str, Any]] = [
    {"id": "tiny", "kind": "base", "parent": None},
    *(
        {"id": f"ft:tiny:default:{suffix}:{digits}0000{tail}", "kind": kind, "parent": "tiny", "job": of}
        for suffix, digits, tail, kind, of in (
            ("docs", "bbbb3333", ":ckpt-step-9", "checkpoint", OTHER),
            ("docs", "bbbb3333", "", "adapter", OTHER),
            ("tut", "aaaa2222", "", "adapter", NEW),
            ("", "aaaa1111", "", "adapter", OLD),
        )
    ),
]
DOCS, TUT, BARE = (f"ft:tiny:default:{of}0000" for of in ("docs:bbbb3333", "tut:aaaa2222", ":aaaa1111"))
JOBS: list[dict[str, Any]] = [
    {"id": OTHER, "suffix": "docs", "fine_tuned_model": DOCS},
    {"id": NEW, "suffix": "tut", "fine_tuned_model": None},
    {"id": OLD, "suffix": "tut", "fine_tuned_model": BARE},
]


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("latest", OTHER),
        ("docs", OTHER),
        ("ftjob-b", OTHER),
        ("bbbb", OTHER),
        ("aaaa1", OLD),
        (DOCS, OTHER),
        (DOCS[:-5], OTHER),
        ("ftjob-c", "ftjob-c"),
        ("bbb", "bbb"),
        ("doc", "doc"),
        ("", ""),
    ],
)
def test_a_job_is_called_by_suffix_beginning_or_age(name: str, full: str) -> None:
    assert job_id(name, lambda: JOBS) == full


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("latest", DOCS),
        ("docs", DOCS),
        ("docs:ckpt-step-9", DOCS + ":ckpt-step-9"),
        ("bbbb:ckpt-step-9", DOCS + ":ckpt-step-9"),
        ("tut", TUT),
        (NEW, TUT),
        ("aaaa1", BARE),
        ("ft:tiny:default:t", TUT),
        ("tiny", "tiny"),
        ("tin", "tin"),
        ("none", "none"),
        ("none:ckpt-step-1", "none:ckpt-step-1"),
        ("", ""),
    ],
)
def test_a_model_is_called_by_suffix_beginning_job_or_age(name: str, full: str) -> None:
    assert model_name(name, lambda: MODELS) == full


def test_several_are_listed_and_none_is_chosen() -> None:
    with pytest.raises(Ambiguous) as refused:
        job_id("tut", lambda: JOBS)
    assert refused.value.candidates == [NEW, OLD]
    with pytest.raises(Ambiguous):
        model_name("ft:tiny", lambda: MODELS)
    with pytest.raises(NothingYet):
        job_id("latest", lambda: [])
    with pytest.raises(NothingYet):
        model_name("latest", lambda: MODELS[:1])


def test_full_names_ask_nobody() -> None:
    def asked() -> list[dict[str, Any]]:
        raise AssertionError("a full name was asked for")

    assert job_id(OLD, asked) == OLD
    for name in (DOCS, BARE, DOCS + ":ckpt-step-9", "adapter-1"):
        assert model_name(name, asked) == name


@given(st.lists(st.text("abcdef0123456789", min_size=24, max_size=24), min_size=1, max_size=9, unique=True), st.data())
def test_a_beginning_stands_for_the_only_one_that_begins_so(ids: list[str], data: st.DataObject) -> None:
    jobs = [{"id": f"ftjob-{digits}", "suffix": None, "fine_tuned_model": None} for digits in ids]
    begun = data.draw(st.sampled_from(ids))[: data.draw(st.integers(FEWEST_DIGITS, 24))]
    matching = [each["id"] for each in jobs if str(each["id"]).startswith(f"ftjob-{begun}")]
    if len(matching) == 1:
        assert [job_id(begun, lambda: jobs)] == matching
        return
    with pytest.raises(Ambiguous) as refused:
        job_id(begun, lambda: jobs)
    assert refused.value.candidates == matching


def test_the_command_line_says_whom_it_means_and_the_api_gets_full_names() -> None:
    jobs = [job(**each) for each in JOBS]
    with FakeGateway({"GET /v1/models": (200, {"data": MODELS})}) as gateway:
        gateway.answers["GET /v1/fine_tuning/jobs"] = (200, {"data": jobs, "has_more": False})
        gateway.answers["POST /generate"] = (200, {"generated_text": "A module."})
        gateway.answers[f"POST /v1/fine_tuning/jobs/{OTHER}/pause"] = (200, job(state="pausing"))
        assert run(gateway, "generate", "x", "--adapter", "tut") == (0, "A module.\n", f"model {TUT}\n")
        assert gateway.bodies[-1][1]["parameters"]["adapter_id"] == TUT
        assert run(gateway, "jobs", "pause", "docs") == (0, "pausing\n", f"job {OTHER}\n")
        several = f"error: 'tut' is the name of 2: say more of it\n  {NEW}\n  {OLD}\n"
        assert run(gateway, "wait", "tut") == run(gateway, "jobs", "show", "tut") == (1, "", several)
        gateway.answers["GET /v1/fine_tuning/jobs"] = (200, {"data": [], "has_more": False})
        nothing = "error: there is no job yet; next: tunesmith train FILE\n"
        assert run(gateway, "wait", "latest") == (4, "", nothing)
