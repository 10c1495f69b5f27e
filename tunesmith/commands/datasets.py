"""What a command names as its datasets: ids on the server, or files, here or on the hub, that are uploaded for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tunesmith import hub
from tunesmith.commands.options import OnBadRows
from tunesmith.hub import Found
from tunesmith.hub_files import PREFIX, HubError, HubName

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
    """Datasets as a job's command names them, their files all there; those of the hub are downloaded.

    Raises:
        OSError: a file cannot be read.
        HubError: the hub does not give one; or a validation dataset of it has several files.
        typer.BadParameter: there are more files than a job takes, or none whose bad rows could be skipped.
    """
    found = [_found(name) for name in training]
    count = sum(len(each.files) if isinstance(each, Found) else 1 for each in found)
    if count > MOST_FILES:
        raise typer.BadParameter(f"a job takes at most {MOST_FILES} files, not {count}")
    held_out = [_found(validation)] if validation else []
    for each in held_out:
        if isinstance(each, Found) and len(each.files) > 1:
            files = ", ".join(each.files)
            raise HubError(f"a job has one validation file, and these are {len(each.files)}: name one of {files}")
    if on_bad_rows is OnBadRows.SKIP and all(isinstance(each, str) for each in (*found, *held_out)):
        raise typer.BadParameter("--on-bad-rows is for files that are uploaded; these are on the server already")
    return Named(_here(found), next(iter(_here(held_out)), None))


def files_to_upload(name: str) -> list[Path]:
    """A file, or those of a dataset of the hub, which are downloaded.

    Raises:
        OSError: it cannot be read.
        HubError: the hub does not give it.
    """
    found = _found(name)
    return [Path(each) for each in _here([Path(found) if isinstance(found, str) else found])]


def _found(name: str) -> "str | Path | Found":
    path = Path(name)
    if not path.exists():
        if name.startswith("file-"):
            return name
        if name.startswith(PREFIX):
            return hub.find(HubName.parse(name))
    # Before anything is uploaded: what is missing is missing from a command as a whole.
    path.stat()
    return path


def _here(found: "Sequence[str | Path | Found]") -> list[str | Path]:
    from tunesmith.output import plain, say

    datasets: list[str | Path] = []
    for each in found:
        if isinstance(each, Found):
            say(plain(f"{each.repo}@{each.commit}: {', '.join(each.files)}"))
            datasets += hub.download(each)
        else:
            datasets.append(each)
    return datasets


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
