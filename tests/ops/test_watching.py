"""What operators load into Prometheus and Grafana, held to what a real stack says of itself.

With `PROMTOOL` set (`make test-ops`), promtool judges the pages and the rules, too.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.stack_processes import clean_environment
from tests.tiny import write_catalogue, write_tiny_model
from tunesmith.local_stack import stack

pytestmark = pytest.mark.servers
ROOT = Path(__file__).resolve().parents[2]
ALERTS, BOARD, DOCS = ROOT / "docker/alerts.yml", ROOT / "docker/grafana.json", ROOT / "docs/operations.md"
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
NAME = r"\b(?:tunesmith_[a-z0-9_]+|tgi_[a-z0-9_]+)\b"
PROMTOOL = os.environ.get("PROMTOOL", "")


@dataclass
class Pages:
    """Both pages of a stack that has answered a request, and the labels of every series by its name."""

    gateway: str
    inference: str

    def labels(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for page in (self.gateway, self.inference):
            for family in text_string_to_metric_families(page):
                for suffix in SUFFIXES.get(family.type, ("",)):
                    found.setdefault(family.name + suffix, set())
                for sample in family.samples:
                    found.setdefault(sample.name, set()).update(sample.labels)
        return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    folder = tmp_path_factory.mktemp("watched")
    catalogue = write_catalogue(folder / "catalogue.toml", write_tiny_model(folder / "model"))
    environ = clean_environment() | {"TUNESMITH_CATALOGUE": str(catalogue), "OMP_NUM_THREADS": "1"}
    connection = stack.up(folder / "home", port=0, base="tiny", environ=environ).connection
    try:
        headers = {"authorization": f"Bearer {connection.api_key}"}
        with httpx.Client(base_url=connection.url, headers=headers, timeout=60, trust_env=False) as http:
            body = {"inputs": "What", "parameters": {"max_new_tokens": 2}}
            assert http.post("/generate", json=body).status_code == 200
            answers = [http.get(path) for path in ("/metrics", "/metrics/inference")]
        assert [answer.status_code for answer in answers] == [200, 200]
        yield Pages(*(answer.text for answer in answers))
    finally:
        stack.down(folder / "home")


def expressions() -> list[str]:
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    panels = json.loads(BOARD.read_text())["panels"]
    return [rule["expr"] for rule in rules] + [target["expr"] for panel in panels for target in panel["targets"]]


def test_every_series_and_label_in_rules_board_and_docs_is_there(pages: Pages) -> None:
    labels = pages.labels()
    # A family without a series says its name alone: its labels are those of the code.
    labels["tunesmith_worker_out_of_service"] |= {"worker", "base"}
    labels["tunesmith_jobs_failed"] |= {"code"}
    said = expressions()
    for expression in said:
        for name in re.findall(NAME, expression):
            assert name in labels, expression
        for name, matchers in re.findall(rf"({NAME}){{([^}}]*)}}", expression):
            assert set(re.findall(r"(\w+)\s*[=!]", matchers)) <= labels[name], expression
    assert len(said) > 25
    in_docs = set(re.findall(NAME, DOCS.read_text())) - {"tgi_"}
    assert len(in_docs) > 8
    assert in_docs <= labels.keys(), in_docs - labels.keys()


def test_what_is_there_is_well_named(pages: Pages) -> None:
    """Prometheus' rules, as far as they can be told from a name: a prefix, base units, `_total` for counters alone."""
    for page in (pages.gateway, pages.inference):
        for family in text_string_to_metric_families(page):
            name = family.name
            if "Deprecated" in family.documentation or name.startswith("tgi_"):
                # text-generation-inference's own names.
                continue
            assert name.startswith("tunesmith_"), name
            assert not re.search(r"_(duration|ms|millis|mb|percent)\b", name), name
            assert family.documentation
            if family.type == "histogram":
                assert name.endswith("_seconds"), name
            assert not any(sample.name.endswith("_created") for sample in family.samples), name


def test_the_state_of_an_idle_stack(pages: Pages) -> None:
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(pages.gateway)
        for sample in family.samples
    }
    assert found["tunesmith_up", "tiny", "inference"] == found["tunesmith_up", "database"] == 1
    assert found["tunesmith_workers",] == 1
    assert found["tunesmith_job_oldest_queued_seconds",] == found["tunesmith_lease_silence_seconds",] == 0
    assert found["tunesmith_artifacts_free_bytes",] > 0
    assert found["tunesmith_job_attempts_total", "worker_lost"] == 0
    assert 'tunesmith_engine_tokens_total{replica="0"} ' in pages.inference


def test_every_alert_says_what_is_wrong_and_how_bad_it_is() -> None:
    rules: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 10
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"].endswith(".")


def test_the_board_asks_the_chosen_source_and_overlaps_nowhere() -> None:
    panels = json.loads(BOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len({str(panel["gridPos"]) for panel in panels}) == len(panels)
    assert {panel["datasource"]["uid"] for panel in panels} == {"${source}"}
    assert all(target["expr"].count("(") == target["expr"].count(")") for p in panels for target in p["targets"])


@pytest.mark.skipif(not PROMTOOL, reason="PROMTOOL is not set: make test-ops")
def test_promtool_takes_rules_and_pages(pages: Pages, tmp_path: Path) -> None:
    judged = subprocess.run([PROMTOOL, "check", "rules", str(ALERTS)], capture_output=True, text=True)
    assert judged.returncode == 0, judged.stdout + judged.stderr
    for page in (pages.gateway, pages.inference):
        judged = subprocess.run([PROMTOOL, "check", "metrics"], input=page, capture_output=True, text=True)
        # 3: it dislikes a name. The deprecated ones and TGI's are not ours to choose.
        disliked = [line for line in judged.stderr.splitlines() if not line.startswith(("tgi_", "http_requests"))]
        assert judged.returncode in (0, 3), judged.stderr
        assert disliked == [], judged.stderr
    # And that what it was asked is what it can judge.
    wrong = subprocess.run(
        [PROMTOOL, "check", "metrics"], input="# TYPE a counter\na 1\n", capture_output=True, text=True
    )
    assert wrong.returncode == 3
