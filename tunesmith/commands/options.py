"""Arguments and options that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tunesmith import completion
from tunesmith.hub_files import FORM


class OnBadRows(StrEnum):
    """What becomes of a file with rows that cannot be learnt."""

    REFUSE = "refuse"
    SKIP = "skip"


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
JobId = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="An id (ftjob-…) or its beginning, a suffix, or 'latest'.", autocompletion=completion.jobs
    ),
]
HomeOption = Annotated[Path, typer.Option(envvar="TUNESMITH_HOME", help="Folder of everything the stack keeps.")]
Timeout = Annotated[float | None, typer.Option(help="Stop waiting after so many seconds (exit 3); the job goes on.")]
ADAPTER = "A fine-tuned model or checkpoint, its suffix or beginning, or 'latest'"
Adapter = Annotated[
    str | None, typer.Option(help=f"{ADAPTER}; the base if unsaid.", autocompletion=completion.adapters)
]
MaxNewTokens = Annotated[int, typer.Option(min=1)]
Temperature = Annotated[float | None, typer.Option(help="Sample; greedy if unsaid.")]
Datasets = Annotated[
    list[str], typer.Argument(metavar="FILE…", help=f"Datasets to upload, ids (file-…), or {FORM}; trained on as one.")
]
BadRows = Annotated[OnBadRows, typer.Option(help="Refuse a file with bad rows, or leave such rows out.")]
DEFAULT_HOME = Path(".tunesmith")
DEFAULT_BASE = "smollm2-135m-instruct"


def group(help: str) -> typer.Typer:
    """A noun with verbs below it."""
    return typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=help)
