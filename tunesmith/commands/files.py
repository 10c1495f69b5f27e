"""`upload` and `files`: datasets on the server."""

from typing import Annotated

import typer

from tunesmith.commands import datasets, options
from tunesmith.commands.options import AsJson, BadRows, OnBadRows
from tunesmith.hub_files import FORM, PREFIX

group = options.group("List and delete datasets.")


FileId = Annotated[str, typer.Argument(metavar="FILE", help="file-…")]


def upload(
    file: Annotated[str, typer.Argument(help=f"JSON lines, a JSON array, CSV or Parquet; or {FORM}.")],
    on_bad_rows: BadRows = OnBadRows.REFUSE,
    json: AsJson = False,
) -> None:
    """Upload a dataset; every row is checked. Prints the file's id; of a dataset of the hub each file's, a line each.

    With --json such a dataset is a list.
    """
    from tunesmith.output import session, show_json

    with session(timeout=600) as client:
        answers, warned = [], datasets.Warnings()
        for path in datasets.files_to_upload(file):
            answers.append(datasets.stored(client, path, on_bad_rows))
            if not json:
                datasets.describe(answers[-1], warned)
                print(answers[-1]["id"], flush=True)
    if json:
        show_json(answers if file.startswith(PREFIX) else answers[0])


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
