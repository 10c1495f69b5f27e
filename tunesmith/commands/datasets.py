"""What a command names as its datasets: ids on the server, or files here that are uploaded for the purpose."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tunesmith.commands.options import OnBadRows

if TYPE_CHECKING:
    from tunesmith.client import Client

# As many as a job takes: told before the first is uploaded.
MOST_FILES = 16


@dataclass(frozen=True, slots=True)
class Named:
    """Datasets that a command names: ids, or paths of files to upload."""

    training: list[str | Path]
    validation: str | Path | None = None


def find(training: Sequence[str], on_bad_rows: OnBadRows, validation: str | None = None) -> Named:
    """Datasets as they are named, of which all files are there.

    Raises:
        OSError: a file cannot be read.
        typer.BadParameter: there are more files than a job takes, or none whose bad rows could be skipped.
    """
    named = Named([_found(name) for name in training], _found(validation) if validation else None)
    if len(named.training) > MOST_FILES:
        raise typer.BadParameter(f"a job takes at most {MOST_FILES} files, not {len(named.training)}")
    if on_bad_rows is OnBadRows.SKIP and not any(isinstance(one, Path) for one in (*named.training, named.validation)):
        raise typer.BadParameter("--on-bad-rows is for files that are uploaded; these are on the server already")
    return named


def _found(name: str) -> str | Path:
    path = Path(name)
    if name.startswith("file-") and not path.exists():
        return name
    # Before anything is uploaded: what is missing is missing from a command as a whole.
    path.stat()
    return path


def file_id(client: "Client", dataset: str | Path, on_bad_rows: OnBadRows) -> str:
    """The id of a dataset, which is uploaded if it is a file."""
    if isinstance(dataset, str):
        return dataset
    answer = client.upload(dataset, on_bad_rows.value)
    describe(answer)
    return str(answer["id"])


def files_of_job(client: "Client", named: Named, on_bad_rows: OnBadRows) -> dict[str, Any]:
    """What a job's body says of its files, which are uploaded."""
    ids = [file_id(client, dataset, on_bad_rows) for dataset in named.training]
    body: dict[str, Any] = {"training_file": ids[0]} if len(ids) == 1 else {"training_files": ids}
    if named.validation is not None:
        body["validation_file"] = file_id(client, named.validation, on_bad_rows)
    return body


def describe(file: dict[str, Any]) -> None:
    """What is in a dataset, and the advice about it, on stderr."""
    from tunesmith.output import plain, say

    dataset = file["dataset"]
    say(f"{plain(file['filename'])}: {dataset['rows']} {dataset['format']} rows, {dataset['duplicates']} duplicates")
    for warning in dataset["warnings"]:
        say(f"warning: {plain(warning)}")
