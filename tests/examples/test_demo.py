"""The demo's own judgement: it must fail when something is off. The journey itself runs in `make demo`."""

import io
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from examples.demo import DemoFailed, ask, check, show, write_dataset
from examples.stdlib_docstrings import build_dataset
from tunesmith.client import Client
from tunesmith.connection import Connection

Json = dict[str, Any]


def job(before: float | None = 3.1, after: float | None = 2.9, **more: Any) -> Json:
    report = {"eval_loss_before": before, "eval_loss_after": after, "quantized_layers": 210}
    return {"base_precision": "int8", "report": report} | more


def test_a_job_that_learned_in_8_bits_passes() -> None:
    check(job())
    check(job(3.0, 2.88))


@pytest.mark.parametrize(
    "bad",
    [
        job(3.1, 2.99),
        job(3.1, 3.2),
        job(3.1, float("nan")),
        job(None, None),
        job(base_precision="fp32"),
        job() | {"report": job()["report"] | {"quantized_layers": 0}},
    ],
)
def test_anything_less_fails(bad: Json) -> None:
    with pytest.raises(DemoFailed):
        check(bad)


def asked(headers: dict[str, str], adapter: str | None) -> tuple[list[Json], float | None, list[bytes]]:
    """Ask a fake gateway that answers everything alike, with these headers on the answer to the first question."""
    bodies: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        body = request.read()
        bodies.append(body)
        first = headers if b"What?" in body else {}
        return httpx.Response(200, json={"generated_text": " It [does]. "}, headers=first)

    with Client(Connection("http://fake", "ts-key"), transport=httpx.MockTransport(answer)) as client:
        answers, milliseconds = ask(client, [("What?", "training"), ("Why?", "held-out")], adapter)
    return answers, milliseconds, bodies


def test_answers_name_their_split_and_the_first_one_the_load() -> None:
    answers, milliseconds, bodies = asked({"x-adapter-loaded-in-ms": "41.5"}, "ft:x")
    assert milliseconds == 41.5
    assert answers == [
        {"question": "What?", "split": "training", "answer": "It [does]."},
        {"question": "Why?", "split": "held-out", "answer": "It [does]."},
    ]
    assert all(b'"adapter_id":"ft:x"' in body for body in bodies)
    _, nothing, bodies = asked({}, None)
    assert nothing is None
    assert not any(b"adapter_id" in body for body in bodies)


def test_an_adapter_that_was_never_loaded_fails_the_demo() -> None:
    with pytest.raises(DemoFailed):
        asked({}, "ft:x")


def test_table_shows_what_models_wrote_as_they_wrote_it() -> None:
    out = io.StringIO()
    answers, _, _ = asked({}, None)
    numbers = {"trainable_params": 460_800, "eval_loss_before": 3.1, "eval_loss_after": 2.9, "tokens_per_second": 190.4}
    result = numbers | {"base_model": "b", "fine_tuned_model": "ft:x", "hot_load_ms": 41.5}
    show(result | {"base_answers": answers, "tuned_answers": answers}, Console(file=out, width=100))
    assert "It [does]." in out.getvalue()
    assert "held-out loss      3.100 -> 2.900  (-0.200)" in out.getvalue()
    assert "460,800" in out.getvalue()


def test_dataset_files_have_one_row_a_line(tmp_path: Path) -> None:
    training, held_out = build_dataset(5, 2)
    paths = write_dataset(tmp_path / "demo", training, held_out)
    assert [len(path.read_text().splitlines()) for path in paths] == [5, 2]
