"""A real dataset that every machine has: the documentation strings of Python's own standard library.

`python -m examples.stdlib_docstrings train.jsonl held_out.jsonl` writes instruction rows
`{"instruction": "What does `json.dumps` do in Python?", "output": "Serialize ``obj`` to a JSON formatted ``str``. …"}`.

Same interpreter, same rows: names are ordered by their hash, and the split is by name. A text that several names share
(aliases, inherited methods) is used once, so that no held-out answer was trained on.
"""

import argparse
import hashlib
import importlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

Row = dict[str, str]
# Importing these opens a browser or a window, prints, or breaks the import system.
SKIPPED = frozenset(
    {
        *("antigravity", "this", "idlelib", "test", "turtle", "turtledemo", "tkinter", "lib2to3", "distutils"),
        *("ensurepip", "venv", "pydoc_data", "sre_compile", "sre_constants", "sre_parse"),
    }
)
MIN_CHARACTERS, MAX_CHARACTERS = 40, 1_600
_SIGNATURE = re.compile(r"[\w.]+\(.*?\)(\s*->.*)?$")


def build_dataset(training: int = 300, held_out: int = 40) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, disjoint in names and in texts.

    Raises:
        ValueError: this interpreter's library has fewer.
    """
    rows = all_rows()
    if len(rows) < training + held_out:
        raise ValueError(f"only {len(rows)} documented names, {training + held_out} were asked for")
    return rows[held_out : held_out + training], rows[:held_out]


def all_rows() -> list[Row]:
    """Every documented public name of the standard library, in the order of the names' hashes."""
    seen: set[str] = set()
    texts: dict[str, str] = {}
    with warnings.catch_warnings():
        # Deprecated names warn when they are imported, some even when an attribute is read.
        warnings.simplefilter("ignore")
        documented = sorted((name, _doc(thing)) for name, thing in _documented())
    for name, doc in documented:
        text = normalised(doc)
        if text and text not in seen:
            seen.add(text)
            texts[name] = text
    ordered = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    return [{"instruction": f"What does `{name}` do in Python?", "output": texts[name]} for name in ordered]


def normalised(doc: str) -> str:
    """A docstring's paragraphs up to the first example or the length limit, without a leading signature line.

    Returns:
        Empty if too little is left.
    """
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(doc).strip())
    if _SIGNATURE.fullmatch(paragraphs[0].split("\n")[0]):
        # C functions repeat their signature, and the question names the function already.
        paragraphs[0] = "\n".join(paragraphs[0].split("\n")[1:])
    kept: list[str] = []
    for paragraph in filter(None, (part.strip() for part in paragraphs)):
        if ">>>" in paragraph or sum(map(len, kept)) + len(paragraph) > MAX_CHARACTERS:
            break
        kept.append("\n".join(line.rstrip() for line in paragraph.split("\n")))
    text = "\n\n".join(kept)
    return text if len(text) >= MIN_CHARACTERS else ""


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """JSON lines, UTF-8."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _documented() -> Iterator[tuple[str, Any]]:
    """Public modules, functions, classes and methods with their dotted names."""
    for module in _modules():
        yield module.__name__, module
        for name, thing in sorted(vars(module).items()):
            # Names that the module imports belong to other modules.
            if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(thing):
                yield f"{module.__name__}.{name}", thing
                for method, value in sorted(vars(thing).items()):
                    if not method.startswith("_") and (inspect.isroutine(value) or isinstance(value, property)):
                        yield f"{module.__name__}.{name}.{method}", value
            elif inspect.isroutine(thing):
                yield f"{module.__name__}.{name}", thing


def _modules() -> Iterator[ModuleType]:
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in SKIPPED:
            continue
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            try:
                module = importlib.import_module(name)
            except ImportError:
                # A module of another platform, or one left out of this build.
                continue
        yield module


def _doc(thing: Any) -> str:
    doc = getattr(thing, "__doc__", None)
    return doc if isinstance(doc, str) else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("training", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--held-out-rows", type=int, default=40)
    arguments = parser.parse_args()
    training, held_out = build_dataset(arguments.rows, arguments.held_out_rows)
    write_rows(arguments.training, training)
    write_rows(arguments.held_out, held_out)


if __name__ == "__main__":
    main()
