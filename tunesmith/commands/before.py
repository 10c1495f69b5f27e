"""`preview` and `estimate`: what a job would train on and what it would take, before it is started."""

import sys
from typing import Annotated, Any

import typer

from tunesmith.commands import datasets
from tunesmith.commands.options import DEFAULT_BASE, AsJson, BadRows, Datasets, OnBadRows
from tunesmith.hub_files import FORM

Dataset = Annotated[
    str, typer.Argument(metavar="FILE", help=f"A dataset to upload, the id of one (file-…), or {FORM}.")
]
Model = Annotated[str, typer.Option(help="Base model.")]
_GREEN, _RESET = "\x1b[32m", "\x1b[0m"


def preview(
    file: Dataset,
    model: Model = DEFAULT_BASE,
    rows: Annotated[int, typer.Option(min=1, max=100, help="How many rows.")] = 3,
    max_length: Annotated[int, typer.Option(min=8)] = 512,
    on_bad_rows: BadRows = OnBadRows.REFUSE,
    json: AsJson = False,
) -> None:
    """Show rows as the model will be given them; supervised text is green, or between »« where there is no colour."""
    from tunesmith.output import say, session, show_json

    with session(timeout=600) as client:
        first, *others = datasets.find([file], on_bad_rows).training
        if others:
            say(f"the first of {len(others) + 1} files is shown")
        shown = datasets.file_id(client, first, on_bad_rows, datasets.Warnings())
        answer = client.preview(shown, model=model, limit=rows, max_length=max_length)
    if json:
        show_json(answer)
        return
    for row in answer["data"]:
        supervised = f"{row['supervised_tokens']} supervised"
        result = "dropped: no supervised token is left" if row["dropped"] else supervised
        say(f"row {row['row']}: {row['tokens']} tokens, {result}")
        print("".join(map(_marked, row["pieces"])))
    lengths = answer["lengths"]
    say(
        f"of {lengths['rows']} rows looked at, {lengths['cut']} would be cut and {lengths['dropped']} dropped at "
        f"max_length {max_length}; the longest has {lengths['longest']} tokens"
    )


def _marked(piece: dict[str, Any]) -> str:
    # Lines are kept; anything else a terminal would obey is not.
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in piece["text"])
    if not piece["supervised"]:
        return text
    return f"{_GREEN}{text}{_RESET}" if sys.stdout.isatty() else f"»{text}«"


def estimate(
    files: Datasets,
    model: Model = DEFAULT_BASE,
    epochs: Annotated[int | None, typer.Option(help="Times through the data.")] = None,
    precision: Annotated[str, typer.Option(help="How the base is held: int8, nf4, bf16, fp16, fp32.")] = "int8",
    preset: Annotated[str, typer.Option(help="recommended, or the tutorial's: reference.")] = "recommended",
    on_bad_rows: BadRows = OnBadRows.REFUSE,
    json: AsJson = False,
) -> None:
    """Say what a job would take: steps, tokens, and, once a job of its kind has finished here, minutes and memory."""
    from tunesmith import preflight
    from tunesmith.output import session, show, show_json

    with session(timeout=600) as client:
        named, warned = datasets.find(files, on_bad_rows), datasets.Warnings()
        options: dict[str, Any] = {"model": model, "base_precision": precision, "preset": preset}
        # An impossible number is for the gateway to refuse.
        options |= {} if epochs is None else {"hyperparameters": {"n_epochs": epochs}}
        if named.uploads:
            preflight.check(client, options)
        answer = client.estimate(options | datasets.files_of_job(client, named, on_bad_rows, warned))
    if json:
        show_json(answer)
        return
    show(f"{answer['total_steps']} steps, {answer['tokens']} tokens, {answer['supervised_tokens']} of them supervised")
    if answer["minutes"] is None:
        show("time and memory: not calibrated, no job of this base and precision has finished here yet")
    else:
        peak = answer["peak_memory_mb"]
        memory = "memory not known" if peak is None else f"{peak:.0f} MB at the peak"
        show(f"about {answer['minutes']:.1f} minutes, {memory}")
    warned.say(answer["warnings"])
