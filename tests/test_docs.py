"""The pages in docs/ agree with the code: settings, routes, links, make targets."""

import ast
import json
import re
from pathlib import Path

import pytest

from services.gateway.jobs.request_schema import JobRequest
from services.gateway.settings import GatewaySettings
from services.inference.settings import InferenceSettings
from services.trainer.settings import TrainerSettings
from shared.jobs.spec import TRANSITIONS, Hyperparameters, LoraSpec
from shared.settings import Settings

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))])


def test_every_setting_is_in_the_tables_and_nothing_else() -> None:
    """Values of a setting stand in the last column, so that the first has names only."""
    first_cells = re.findall(r"^\| (`[^|]+) \|", (DOCS / "configuration.md").read_text(), re.M)
    documented = set(re.findall(r"`([A-Z_]+)`", " ".join(first_cells)))
    plain = {*Settings.model_fields, *GatewaySettings.model_fields, *TrainerSettings.model_fields}
    expected = {f"TUNESMITH_{name.upper()}" for name in plain}
    expected |= {name.upper() for name in InferenceSettings.model_fields if name not in Settings.model_fields}
    assert documented == expected


def test_every_route_is_in_the_table_and_nothing_else() -> None:
    document = json.loads((ROOT / "openapi" / "gateway.json").read_text())
    served = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    assert set(re.findall(r"^\| `([A-Z]+ /[^`]*)`", (DOCS / "api.md").read_text(), re.M)) == served


def test_every_key_of_a_job_is_explained() -> None:
    jobs = (DOCS / "api.md").read_text().split("## Jobs")[1].split("## Idempotency")[0]
    names = {*JobRequest.model_fields, *Hyperparameters.model_fields, *LoraSpec.model_fields} - {"integrations"}
    assert names - set(re.findall(r"`([a-z_0-9]+)`", jobs)) == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} → {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_and_module_exists(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:`|^)make ([a-z0-9-]+)", text, re.M)) <= targets
    for module in re.findall(r"python -m ((?:services|shared|tunesmith|benchmarks|docs)[a-z_.]*)", text):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_every_step_of_the_walks_is_where_the_page_says() -> None:
    walks = (DOCS / "architecture.md").read_text().split("## Four walks")[1].split("### What they cost")[0]
    steps = re.findall(r"^\| .+ \| (`services.+|`shared.+) \|$", walks, re.M)
    assert len(steps) > 25
    missing = []
    for cell in steps:
        source = ""
        for name in re.findall(r"`([^`]+)`", cell):
            if name.endswith(".py"):
                source = (ROOT / name).read_text() if (ROOT / name).exists() else ""
            elif not re.search(rf"^\s*(?:async )?(?:def|class) {name}\b|^{name} = ", source, re.M):
                missing.append(f"{name} in {cell}")
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_with_a_folder_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:services|shared|tunesmith|tests|benchmarks|docs|examples|docker|openapi)/[^`*…<> ]+)`", page.read_text()
    )
    assert [name for name in named if not (ROOT / name.split("::")[0]).exists()] == []


def test_the_states_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| ([^|]+) \|$", (DOCS / "architecture.md").read_text(), re.M)
    written = {state: (status, set(re.findall(r"`(\w+)`", targets))) for state, status, targets in rows}
    assert written == {s.value: (s.status, {t.value for t in targets}) for s, targets in TRANSITIONS.items()}


def test_nothing_reads_what_could_run_code() -> None:
    """SECURITY.md's promise: no pickle, no `torch.load`, no code that comes with a model."""
    for folder in ("shared", "services", "tunesmith"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
                module = node.module if isinstance(node, ast.ImportFrom) else None
                assert not {"pickle", "marshal", "shelve", "dill", "joblib"} & {*names, module}, path
                assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"), path
                assert not (isinstance(node, ast.keyword) and node.arg == "trust_remote_code"), path
