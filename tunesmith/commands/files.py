"""`upload` and `files`: datasets on the server."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.commands import options
from tunesmith.commands.options import AsJson

group = options.group("List and delete datasets.")


class OnBadRows(StrEnum):
    """What becomes of a file with rows that cannot be learnt."""

    REFUSE = "refuse"
    SKIP = "skip"


FileId = Annotated[str, typer.Argument(metavar="FILE", help="file-…")]


def upload(
    file: Annotated[Path, typer.Argument(help="JSON lines, a JSON array, CSV or Parquet.")],
    on_bad_rows: Annotated[OnBadRows, typer.Option(help="Refuse the file, or leave such rows out.")] = OnBadRows.REFUSE,
    json: AsJson = False,
) -> None:
    """Upload a dataset; every row is checked. Prints the file's id."""
    from tunesmith.output import session, show_json

    with session(timeout=600) as client:
        answer = client.upload(file, on_bad_rows.value)
    if json:
        show_json(answer)
        return
    describe(answer)
    print(answer["id"])


@group.command("list")
def list_files(limit: Annotated[int, typer.Option(min=1)] = 100, json: AsJson = False) -> None:
    """The newest datasets, newest first."""
    from tunesmith.output import session, show_json, show_table

    with session() as client:
        found = list(client.files(limit))
    if json:
        show_json(found)
        return
    rows = [(file["id"], file["dataset"]["rows"], file["bytes"], file["filename"]) for file in found]
    show_table(("file", "rows", "bytes", "name"), rows)


@group.command("delete")
def delete_file(file: FileId, json: AsJson = False) -> None:
    """Delete a dataset that no unfinished job needs."""
    from tunesmith.output import session, show_json

    with session() as client:
        answer = client.delete_file(file)
    if json:
        show_json(answer)
    else:
        print(answer["id"])


def file_id(client: Any, named: str) -> str:
    """The id of a dataset that is on the server, or of a file that is uploaded for the purpose."""
    path = Path(named)
    if named.startswith("file-") and not path.exists():
        return named
    answer = client.upload(path)
    describe(answer)
    return str(answer["id"])


def describe(file: dict[str, Any]) -> None:
    """What is in a dataset, and the advice about it, on stderr."""
    from tunesmith.output import plain, say

    dataset = file["dataset"]
    say(f"{plain(file['filename'])}: {dataset['rows']} {dataset['format']} rows, {dataset['duplicates']} duplicates")
    for warning in dataset["warnings"]:
        say(f"warning: {plain(warning)}")
