"""The committed API documents are the code's, and are made without what serves it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from services import openapi


@pytest.mark.parametrize("name", openapi.DOCUMENTS)
def test_the_committed_document_is_fresh(name: str) -> None:
    assert name not in openapi.stale(openapi.FOLDER), "run `make openapi`"


@pytest.mark.parametrize("name", openapi.DOCUMENTS)
def test_operation_ids_are_unique_names(name: str) -> None:
    paths = json.loads(openapi.rendered(name))["paths"]
    ids = [operation["operationId"] for item in paths.values() for operation in item.values()]
    assert len(set(ids)) == len(ids) > 5
    assert all(operation.isidentifier() for operation in ids)


def test_a_stale_document_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert openapi.main([], tmp_path) == 0
    assert openapi.main(["--check"], tmp_path) == 0
    document = tmp_path / "gateway.json"
    document.write_text(document.read_text().replace('"openapi"', '"openapi "'))
    assert openapi.main(["--check"], tmp_path) == 1
    assert "openapi/gateway.json" in capsys.readouterr().err


def test_the_documents_are_made_without_torch() -> None:
    code = (
        "import sys; from services import openapi; [openapi.rendered(name) for name in openapi.DOCUMENTS];"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=openapi.FOLDER.parent)
    assert done.stdout.strip() == "[]", done.stderr
