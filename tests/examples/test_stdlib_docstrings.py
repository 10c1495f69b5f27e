import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.stdlib_docstrings import MAX_CHARACTERS, MIN_CHARACTERS, all_rows, build_dataset, normalised, write_rows
from shared.datasets.examples import Instruction
from shared.datasets.forms import parse_row


def test_rows_are_many_documented_and_valid() -> None:
    rows = all_rows()
    assert len(rows) > 2_500
    outputs = {row["instruction"]: row["output"] for row in rows}
    assert outputs["What does `json.dumps` do in Python?"].startswith("Serialize ``obj`` to a JSON formatted ``str``.")
    assert all(isinstance(parse_row(row), Instruction) for row in rows)
    assert all(MIN_CHARACTERS <= len(row["output"]) <= MAX_CHARACTERS + 100 for row in rows)


def test_split_shares_neither_names_nor_texts() -> None:
    training, held_out = build_dataset()
    assert (len(training), len(held_out)) == (300, 40)
    for key in ("instruction", "output"):
        assert len({row[key] for row in training + held_out}) == 340


def test_held_out_rows_stay_held_out_when_more_is_trained() -> None:
    few, held_out = build_dataset(training=10)
    many, same = build_dataset(training=500)
    assert same == held_out
    assert many[:10] == few
    with pytest.raises(ValueError, match="only"):
        build_dataset(training=100_000)


@pytest.mark.parametrize("seed", ["1", "2"])
def test_another_process_builds_the_same_files(tmp_path: Path, seed: str) -> None:
    training, held_out = build_dataset(30, 4)
    write_rows(tmp_path / "here", training)
    paths = (tmp_path / "train.jsonl", tmp_path / "held_out.jsonl")
    command = [sys.executable, "-W", "error", "-m", "examples.stdlib_docstrings", *map(str, paths)]
    done = subprocess.run(
        [*command, "--rows", "30", "--held-out-rows", "4"],
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert paths[0].read_bytes() == (tmp_path / "here").read_bytes()
    assert [json.loads(line) for line in paths[1].read_text().splitlines()] == held_out


LINES = "\n  Return the sum of all\n    the numbers given.  \n\n\n  Slowly.\n"
SUM = "Return the sum of all the numbers that are given."


@pytest.mark.parametrize(
    ("doc", "text"),
    [
        ("", ""),
        ("Too short.", ""),
        (
            "\n  Return the sum of all\n    the numbers given.  \n\n\n  Slowly.\n",
            SUM[:21] + "\n  the numbers given.\n\nSlowly.",
        ),
        ("sum(iterable, start=0) -> number\n\n" + SUM, SUM),
        (SUM + "\n\n>>> sum([1])\n1\n\nMore.", SUM),
    ],
)
def test_normalised(doc: str, text: str) -> None:
    assert normalised(doc) == text


def test_long_documentation_is_cut_between_paragraphs() -> None:
    paragraphs = [f"{number} " + "word " * 60 for number in range(10)]
    text = normalised("\n\n".join(paragraphs))
    assert text == "\n\n".join(paragraph.strip() for paragraph in paragraphs[:5])
