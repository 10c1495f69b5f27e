"""The tree of the code in docs/architecture.md, a line a module, from the modules' docstrings.

`python -m docs.tree` writes it; with `--check` it only says whether it is stale.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from docs.written_part import ROOT, write_or_check

PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree: written by `make docs` -->\n```\n", "```\n<!-- end of tree -->"
PACKAGES = ("shared", "services", "tunesmith", "examples", "benchmarks", "docs")


def main() -> int:
    return write_or_check(PAGE, BEGIN, END, tree())


def tree() -> str:
    """One line for each folder and each module: its name, and the first sentence of its docstring."""
    return "".join(f"{line}\n" for package in PACKAGES for line in _folder(ROOT / package))


def _folder(folder: Path) -> Iterator[str]:
    modules = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    if modules:
        yield f"{folder.relative_to(ROOT)}/"
        yield from (f"  {path.name:<24} {_first_sentence(path)}" for path in modules)
    for child in sorted(
        path for path in folder.iterdir() if path.is_dir() and path.name not in ("versions", "results")
    ):
        if not child.name.startswith(("_", ".")):
            yield from _folder(child)


def _first_sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    first = " ".join(docstring.partition("\n\n")[0].split())
    return first.partition(". ")[0].rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
