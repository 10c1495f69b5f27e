"""Jobs for people: the list, the page, the curve."""

import csv
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tunesmith.fake_gateway import FakeGateway, job
from tests.tunesmith.test_cli import run
from tunesmith.curve import as_csv, drawn, has_loss
from tunesmith.overview import age, line_of

ROUTE = "/v1/fine_tuning/jobs/ftjob-1"
POINTS: list[dict[str, Any]] = [
    {"step": 1, "epoch": 0.5, "train_loss": 2.5, "learning_rate": 0.0002, "tokens_per_second": 1234.5678, "mfu": 0.1},
    {"step": 2, "epoch": 1.0, "train_loss": 1.25, "valid_loss": 1.3333333, "learning_rate": 0.0001},
]


def test_a_line_says_how_a_job_goes() -> None:
    progress = {"step": 11, "total_steps": 45, "loss": 1.5551, "eta_seconds": 164.0}
    running = job(suffix="tut", created_at=1000, progress=progress)
    line = ("ftjob-1", "tut", "running", "3h", "11/45", "1.555", "2:44", "tiny", None)
    assert line_of(running, lambda: 1000 + 3 * 3600 + 59) == line
    # The last ETA of a job that waits is out of date.
    assert line_of(running | {"status": "queued"}, lambda: 1000)[6] is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0s"), (0, "0s"), (59.9, "59s"), (60, "1min"), (7200, "2h"), (172800, "2d")]
)
def test_age_is_one_unit(seconds: float, text: str) -> None:
    assert age(seconds) == text


def test_a_page_leaves_out_what_is_not_known() -> None:
    progress = {"step": 11, "total_steps": 45, "loss": 1.5551, "eta_seconds": 164.0}
    found = job(suffix="tut\x1b[31m", progress=progress, warnings=["few rows"], base_precision="int8", attempt=1)
    with FakeGateway({f"GET {ROUTE}": (200, found)}) as gateway:
        code, out, err = run(gateway, "jobs", "show", "ftjob-1")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "job            ftjob-1",
        "state          running training",
        "suffix         tut [31m",
        "base           tiny (int8)",
        "step           11/45",
        "loss           1.5551",
        "ETA            2:44",
        "attempt        1",
        "warning        few rows",
    ]


def test_metrics_as_a_table_csv_json_and_curve() -> None:
    pages = {"data": POINTS, "has_more": False}
    with FakeGateway({f"GET {ROUTE}/metrics": (200, pages)}) as gateway:
        assert run(gateway, "jobs", "metrics", "ftjob-1")[1] == (
            "step  epoch  loss  held-out  rate    tokens/s\n"
            "1     0.5    2.5   -         0.0002  1234.6\n"
            "2     1      1.25  1.3333    0.0001  -\n"
        )
        assert json.loads(run(gateway, "jobs", "metrics", "ftjob-1", "--json")[1]) == POINTS
        out = run(gateway, "jobs", "metrics", "ftjob-1", "--csv")[1]
        assert out.splitlines()[:2] == [
            "step,epoch,train_loss,learning_rate,tokens_per_second,mfu,valid_loss",
            "1,0.5,2.5,0.0002,1234.5678,0.1,",
        ]
        code, out, err = run(gateway, "jobs", "metrics", "ftjob-1", "--plot")
        assert (code, err) == (0, "")
        assert "loss by step" in out
        assert "training" in out
        assert "\x1b" not in out
        assert run(gateway, "jobs", "metrics", "ftjob-1", "--plot", "--csv")[0] == 2
        gateway.answers[f"GET {ROUTE}/metrics"] = (200, {"data": [], "has_more": False})
        nothing = "error: nothing is measured yet; next: tunesmith jobs show ftjob-1\n"
        assert run(gateway, "jobs", "metrics", "ftjob-1", "--plot") == (1, "", nothing)


@given(
    st.lists(
        st.fixed_dictionaries(
            {"step": st.integers(1, 10**6), "train_loss": st.floats(0, 1e6) | st.just(float("nan"))},
            optional={"valid_loss": st.floats(0, 1e6), "grad_norm": st.floats(0, 1e6)},
        ),
        min_size=1,
        max_size=8,
        unique_by=lambda point: point["step"],
    )
)
def test_csv_loses_nothing(points: list[dict[str, Any]]) -> None:
    for point, row in zip(points, csv.DictReader(io.StringIO(as_csv(points))), strict=True):
        assert {name: float(value) for name, value in row.items() if value} == pytest.approx(point, nan_ok=True)


@pytest.mark.parametrize("width", [40, 60, 100])
def test_a_curve_fits_its_width_and_has_its_figures(width: int) -> None:
    points = [{"step": step, "train_loss": 3 / step, "valid_loss": float("nan")} for step in range(1, 50)]
    assert has_loss(points)
    lines = drawn(points, width).splitlines()
    assert max(map(len, lines)) <= width
    assert "3.0" in "".join(lines)
    assert not has_loss([{"step": 1, "train_loss": float("nan")}])
