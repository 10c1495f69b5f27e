"""`upload` and `files`: datasets on the server."""

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.commands import datasets, options
from tunesmith.commands.options import AsJson, BadRows, OnBadRows

group = options.group("List and delete datasets.")


FileId = Annotated[str, typer.Argument(metavar="FILE", help="file-…")]


def upload(
    file: Annotated[Path, typer.Argument(help="JSON lines, a JSON array, CSV or Parquet.")],
    on_bad_rows: BadRows = OnBadRows.REFUSE,
    json: AsJson = False,
) -> None:
    """Upload a dataset; every row is checked. Prints the file's id."""
    from tunesmith.output import session, show_json

    with session(timeout=600) as client:
        answer = client.upload(file, on_bad_rows.value)
    if json:
        show_json(answer)
        return
    datasets.describe(answer)
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
