"""`train`, `wait` and `jobs`: fine-tuning jobs from their start to their end."""

from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from tunesmith.commands import datasets, options
from tunesmith.commands.options import DEFAULT_BASE, AsJson, BadRows, Datasets, JobId, OnBadRows, Timeout

group = options.group("List, show, watch and steer fine-tuning jobs.")


def train(
    files: Datasets,
    model: Annotated[str, typer.Option(help="Base model.")] = DEFAULT_BASE,
    validation: Annotated[str | None, typer.Option(help="Held-out dataset: a file, an id, or hf:…")] = None,
    epochs: Annotated[int | None, typer.Option(help="Times through the data.")] = None,
    precision: Annotated[str, typer.Option(help="How the base is held: int8, nf4, bf16, fp16, fp32.")] = "int8",
    preset: Annotated[str, typer.Option(help="recommended, or the tutorial's: reference.")] = "recommended",
    suffix: Annotated[str | None, typer.Option(help="A word in the new model's name.")] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    max_steps: Annotated[int | None, typer.Option(help="End after so many optimizer steps.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    on_bad_rows: BadRows = OnBadRows.REFUSE,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, as 'tunesmith wait' does.")] = False,
    json: AsJson = False,
) -> None:
    """Start a fine-tuning job. Prints its id; with --wait, the new model's name once it succeeded."""
    from tunesmith import preflight
    from tunesmith.output import say, session, show_json

    with session(timeout=600) as client:
        named = datasets.find(files, on_bad_rows, validation)
        hyperparameters = {"n_epochs": epochs, "learning_rate": learning_rate, "max_steps": max_steps}
        said = {
            "model": model,
            "suffix": suffix,
            "seed": seed,
            "base_precision": precision,
            "preset": preset,
            "hyperparameters": {name: value for name, value in hyperparameters.items() if value is not None} or None,
        }
        body = {name: value for name, value in said.items() if value is not None}
        if named.uploads:
            preflight.check(client, body)
        warned = datasets.Warnings()
        warned.say(preflight.not_served(client, model))
        job = client.create_job({**body, **datasets.files_of_job(client, named, on_bad_rows, warned)})
    warned.say(job.get("warnings") or [])
    if wait:
        say(job["id"])
        _wait(job["id"], None, json, warned.said)
    if json:
        show_json(job)
    else:
        say(f"next: tunesmith wait {job['id']}")
        print(job["id"])


@group.command("wait")
def wait(job: JobId, timeout: Timeout = None, json: AsJson = False) -> None:
    """Wait for a job to end, showing its progress; survives restarts of the gateway.

    Prints the new model's name.

    Exit codes: 0 succeeded, 1 could not tell, 2 usage, 3 timeout, 4 key refused or no such job, 5 failed, 6 cancelled,
    130 interrupted (the job goes on). In a GitHub action it also writes the step's summary and outputs.
    """
    _wait(job, timeout, json)


@group.command("watch")
def watch(job: JobId, json: AsJson = False) -> None:
    """Print a job's events from the first one on, live, until it ends; survives restarts of the gateway.

    Exit codes as those of 'tunesmith wait'. With --json one object per line.
    """
    from json import dumps

    from tunesmith.follow import follow
    from tunesmith.output import full_job, say, session, show
    from tunesmith.wait import END, Exit, describe_end

    try:
        with session(timeout=30) as client:
            job = full_job(client, job)
            for event in follow(lambda seen: client.stream_events(job, seen), say):
                if json:
                    print(dumps(event), flush=True)
                else:
                    show(_line(event), indent="  ")
            ended = client.job(job)
    except KeyboardInterrupt:
        say(f"interrupted; the job goes on. To watch again: tunesmith jobs watch {job}")
        raise SystemExit(Exit.INTERRUPTED) from None
    say(describe_end(ended))
    raise SystemExit(int(END.get(ended["status"], Exit.COULD_NOT_TELL)))


@group.command("list")
def list_jobs(limit: Annotated[int, typer.Option(min=1)] = 20, json: AsJson = False) -> None:
    """The newest jobs, newest first."""
    from tunesmith.output import session, show_json, show_table
    from tunesmith.overview import COLUMNS, line_of

    with session() as client:
        found = list(client.jobs(limit))
    if json:
        show_json(found)
    else:
        show_table(COLUMNS, map(line_of, found))


@group.command("show")
def show_job(job: JobId, json: AsJson = False) -> None:
    """One job: what it trains on, how far it is, what it warned of. All of it with --json."""
    from tunesmith.output import full_job, plain, session, show, show_json
    from tunesmith.overview import page_of

    with session() as client:
        found = client.job(full_job(client, job))
    if json:
        show_json(found)
        return
    for name, value in page_of(found):
        show(f"{name:14} {plain(value)}", indent="  ")


@group.command("metrics")
def show_metrics(
    job: JobId,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the loss by step.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="All that was measured, unrounded, as CSV.")] = False,
    json: AsJson = False,
) -> None:
    """What a job measured while it trained: loss, learning rate and speed by step."""
    import sys

    from tunesmith import curve
    from tunesmith.layout import width_of
    from tunesmith.output import fail, full_job, session, show_json, show_table

    if plot + csv + json > 1:
        raise typer.BadParameter("--plot, --csv and --json are three forms: choose one")
    with session() as client:
        points = list(client.metrics(full_job(client, job)))
    if json:
        show_json(points)
    elif csv:
        print(curve.as_csv(points), end="")
    elif not plot:
        show_table(curve.COLUMNS, curve.rows_of(points))
    elif curve.has_loss(points):
        print(curve.drawn(points, width_of(sys.stdout) or 80), end="")
    else:
        fail("nothing is measured yet; next: tunesmith jobs show " + job)


@group.command("events")
def list_events(job: JobId, limit: Annotated[int, typer.Option(min=1)] = 1000, json: AsJson = False) -> None:
    """What happened to a job, oldest first."""
    from tunesmith.output import full_job, session, show, show_json

    with session() as client:
        events = list(client.events(full_job(client, job), limit))[::-1]
    if json:
        show_json(events)
        return
    for event in events:
        show(_line(event), indent="  ")


@group.command("cancel")
def cancel_job(job: JobId, json: AsJson = False) -> None:
    """End a job; its checkpoints stay."""
    _act(job, "cancel", json)


@group.command("pause")
def pause_job(job: JobId, json: AsJson = False) -> None:
    """Let a job write a checkpoint and wait."""
    _act(job, "pause", json)


@group.command("resume")
def resume_job(job: JobId, json: AsJson = False) -> None:
    """Let a paused job go on."""
    _act(job, "resume", json)


def _act(job_id: str, verb: str, json: bool) -> None:
    from tunesmith.output import full_job, session, show_json

    with session() as client:
        job = client.act(full_job(client, job_id), verb)
    if json:
        show_json(job)
    else:
        print(job.get("state") or job["status"])


def _line(event: dict[str, Any]) -> str:
    from tunesmith.output import plain
    from tunesmith.overview import when

    return f"{when(event['created_at'])} {event['level']:5} {plain(event['message'])}"


def _wait(name: str, timeout: float | None, json: bool, said: Sequence[str] = ()) -> NoReturn:
    import os
    import sys

    from tunesmith.github import report
    from tunesmith.output import full_job, plain, say, session, show_json
    from tunesmith.progress import watcher_for
    from tunesmith.reasons import NEWEST, Reasons
    from tunesmith.wait import Exit, wait_for_job

    with session(timeout=30) as client:
        job_id = full_job(client, name)

    try:
        with session(timeout=30) as client, watcher_for(sys.stderr) as watcher:
            reasons = Reasons(watcher, lambda: client.events(job_id, NEWEST), said)
            ending = wait_for_job(lambda: client.job(job_id), reasons, timeout=timeout)
    except KeyboardInterrupt:
        say(f"interrupted; the job goes on. To wait again: tunesmith wait {job_id}")
        raise SystemExit(Exit.INTERRUPTED) from None
    say(f"error: {ending.message}" if ending.exit in (Exit.DENIED, Exit.COULD_NOT_TELL) else ending.message)
    try:
        report(job_id, ending, os.environ)
    except OSError as error:
        say(f"warning: GitHub's summary could not be written: {error}")
    if json and ending.job is not None:
        show_json(ending.job)
    elif ending.exit is Exit.SUCCEEDED and ending.job is not None:
        model = plain(ending.job.get("fine_tuned_model"))
        say(f"next: tunesmith generate 'Your question' --adapter {model}")
        print(model)
    raise SystemExit(int(ending.exit))
