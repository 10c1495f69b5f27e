"""`python -m services.openapi` writes openapi/*.json; with `--check` it only says which of them is stale.

The documents are built without torch, a database or a model: each application describes itself before it starts.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "openapi"


def _gateway() -> dict[str, Any]:
    from services.gateway.app import create_app
    from services.gateway.settings import GatewaySettings
    from shared.bases.catalogue import load_catalogue

    return create_app(GatewaySettings(), load_catalogue()).openapi()


def _inference() -> dict[str, Any]:
    from services.inference.app import openapi_document

    return openapi_document()


DOCUMENTS: dict[str, Callable[[], dict[str, Any]]] = {"gateway.json": _gateway, "inference.json": _inference}


def rendered(name: str) -> str:
    """The document of a file name as it should lie on disk: sorted, so that a diff shows what changed and no more."""
    return json.dumps(DOCUMENTS[name](), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def stale(folder: Path) -> list[str]:
    """Names of the documents that are missing from `folder` or differ from the code."""
    return [
        name
        for name in DOCUMENTS
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != rendered(name)
    ]


def main(arguments: list[str] | None = None, folder: Path = FOLDER) -> int:
    """Write the documents, or check them; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m services.openapi", description="Write openapi/*.json.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document is stale")
    if parser.parse_args(arguments).check:
        names = stale(folder)
        for name in names:
            print(f"openapi/{name} is stale: run `make openapi`", file=sys.stderr)
        return 1 if names else 0
    folder.mkdir(exist_ok=True)
    for name in DOCUMENTS:
        (folder / name).write_text(rendered(name), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
