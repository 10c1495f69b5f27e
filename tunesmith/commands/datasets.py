"""What a command names as its datasets: ids on the server, or files, here or on the hub, that are uploaded for it."""

import hashlib
from collections.abc import Iterable, Sequence
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

    @property
    def uploads(self) -> bool:
        """Whether any of them is a file."""
        return any(isinstance(each, Path) for each in (*self.training, self.validation))


class Warnings:
    """Warnings on stderr, each once, whoever has it: the upload, the estimate and the job give the same advice."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, texts: Iterable[str]) -> None:
        from tunesmith.output import plain, say

        for text in map(plain, texts):
            if text not in self.said:
                self.said.append(text)
                say(f"warning: {text}")


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


def file_id(client: "Client", dataset: str | Path, on_bad_rows: OnBadRows, warned: Warnings) -> str:
    """The id of a dataset, which is uploaded if it is a file that is not there yet."""
    if isinstance(dataset, str):
        return dataset
    answer = stored(client, dataset, on_bad_rows)
    describe(answer, warned)
    return str(answer["id"])


def stored(client: "Client", path: Path, on_bad_rows: OnBadRows) -> dict[str, Any]:
    """A file on the server: the one with the same bytes, read the same way, if there is one; else it is uploaded.

    Raises:
        ApiError: it is refused.
        OSError: it cannot be read.
    """
    from tunesmith.output import ALL, plain, say

    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    for known in client.files(ALL):
        # The name's ending says how bytes are read. Rows left out once are not, where bad rows are to be refused.
        same = known.get("sha256") == digest and Path(known["filename"]).suffix.lower() == path.suffix.lower()
        if same and (on_bad_rows is OnBadRows.SKIP or not known["dataset"].get("skipped_rows")):
            say(plain(f"{path.name} is on the server already: {known['id']}"))
            return known
    return client.upload(path, on_bad_rows.value)


def files_of_job(client: "Client", named: Named, on_bad_rows: OnBadRows, warned: Warnings) -> dict[str, Any]:
    """What a job's body says of its files, which are uploaded."""
    ids = [file_id(client, dataset, on_bad_rows, warned) for dataset in named.training]
    body: dict[str, Any] = {"training_file": ids[0]} if len(ids) == 1 else {"training_files": ids}
    if named.validation is not None:
        body["validation_file"] = file_id(client, named.validation, on_bad_rows, warned)
    return body


def describe(file: dict[str, Any], warned: Warnings) -> None:
    """What is in a dataset, and the advice about it, on stderr."""
    from tunesmith.output import plain, say

    dataset = file["dataset"]
    say(f"{plain(file['filename'])}: {dataset['rows']} {dataset['format']} rows, {dataset['duplicates']} duplicates")
    warned.say(dataset["warnings"])
