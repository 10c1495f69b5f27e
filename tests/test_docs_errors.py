"""docs/errors.md lists every error code there is in the source, with its status, and none that is not there."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import errors
from shared.errors import JobFailed, LeaseLost, TunesmithError

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "errors.md").read_text()
# FastAPI's own failures: `on_http` makes a code of the status's phrase. These can happen here.
FROM_HTTP = ("bad_request", "method_not_allowed")
# Raised where no HTTP request is answered, under a code that the API has too.
NEVER_SENT = {
    ("TunesmithError", "schema"),
    ("TunesmithError", "storage_full"),
    ("TunesmithError", "unsupported_precision"),
}
ROW = "RowError"


def codes(value: ast.expr, local: dict[str, ast.expr]) -> Iterator[str]:
    """The codes an expression may become, each as a regular expression; holes of an f-string match any word."""
    match value:
        case ast.Constant(value=str(text)):
            yield re.escape(text)
        case ast.JoinedStr():
            parts = [part.value if isinstance(part, ast.Constant) else None for part in value.values]
            yield "".join("[a-z]+" if part is None else re.escape(str(part)) for part in parts)
        case ast.IfExp():
            yield from codes(value.body, local)
            yield from codes(value.orelse, local)
        case ast.Name() if value.id in local:
            yield from codes(local[value.id], local)


def assigned(scope: ast.Module | ast.ClassDef) -> dict[str, ast.expr]:
    """Names that are given a value anywhere in `scope`."""
    found = {}
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            found[node.target.id] = node.value
    return found


def given(node: ast.AST) -> tuple[str, ast.expr] | None:
    """(who gives a code, the code) if `node` gives one: an error class or a call with `code=`, or a RowError."""
    if isinstance(node, ast.ClassDef) and hasattr(errors, node.name) and "code" in assigned(node):
        return node.name, assigned(node)["code"]
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func).rpartition(".")[2]
        if name == ROW:
            return name, node.args[1]
        for keyword in node.keywords:
            if keyword.arg == "code":
                return name, keyword.value
    return None


def in_the_source() -> set[tuple[str, str]]:
    found = set()
    for folder in ("shared", "services"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            local = assigned(tree)
            for name, value in filter(None, map(given, ast.walk(tree))):
                found |= {(name, code) for code in codes(value, local)}
    return found


def on_the_page() -> list[tuple[str, str, str | None]]:
    """(heading, code, status) of every row of the page; codes of a dataset's rows have no status."""
    rows, heading = [], ""
    for line in PAGE.splitlines():
        heading = line[3:] if line.startswith("## ") else heading
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            rows.append((heading, cells[0].strip("`"), cells[1] if len(cells) == 4 else None))
    return rows


SOURCE = in_the_source()
LISTED = on_the_page()


def test_the_source_was_read() -> None:
    assert {
        ("InvalidRequest", "cannot_[a-z]+"),
        ("InvalidRequest", "invalid_request"),
        ("JobFailed", "invalid_[a-z]+_file"),
        ("JobFault", "worker_lost"),
        ("Conflict", "idempotency_in_flight"),
        (ROW, "mixed_forms"),
    } <= SOURCE


def test_no_code_is_listed_twice() -> None:
    names = [(code, status is None) for _, code, status in LISTED]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("name", "code"), sorted(SOURCE))
def test_every_code_is_listed_with_its_status(name: str, code: str) -> None:
    rows = [
        (heading, status)
        for heading, listed, status in LISTED
        if re.fullmatch(code, listed) and (status is None) == (name == ROW)
    ]
    assert rows, f"`{code}` ({name}) is not in docs/errors.md"
    error = getattr(errors, name, None)
    if error is None or issubclass(error, JobFailed | LeaseLost) or (name, code) in NEVER_SENT:
        return
    assert issubclass(error, TunesmithError)
    for heading, status in rows:
        # What fails before there is a server is a sentence and an exit status.
        assert str(error.status) in str(status) or (heading.startswith("At start") and status == "–"), (heading, status)


def test_no_listed_code_is_gone() -> None:
    def exists(listed: str, status: str | None) -> bool:
        return any(re.fullmatch(code, listed) for name, code in SOURCE if (name == ROW) == (status is None))

    assert [code for _, code, status in LISTED if not exists(code, status) and code not in FROM_HTTP] == []
