"""`train`, `wait` and `jobs`: fine-tuning jobs from their start to their end."""

from datetime import datetime
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
    preset: Annotated[str, typer.Option(help="reference or recommended.")] = "reference",
    suffix: Annotated[str | None, typer.Option(help="A word in the new model's name.")] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    max_steps: Annotated[int | None, typer.Option(help="End after so many optimizer steps.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    on_bad_rows: BadRows = OnBadRows.REFUSE,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, as 'tunesmith wait' does.")] = False,
    json: AsJson = False,
) -> None:
    """Start a fine-tuning job. Prints its id."""
    from tunesmith.output import plain, say, session, show_json

    with session(timeout=600) as client:
        named = datasets.find(files, on_bad_rows, validation)
        hyperparameters = {"n_epochs": epochs, "learning_rate": learning_rate, "max_steps": max_steps}
        body = {
            "model": model,
            **datasets.files_of_job(client, named, on_bad_rows),
            "suffix": suffix,
            "seed": seed,
            "base_precision": precision,
            "preset": preset,
            "hyperparameters": {name: value for name, value in hyperparameters.items() if value is not None} or None,
        }
        job = client.create_job({name: value for name, value in body.items() if value is not None})
    for warning in job.get("warnings") or []:
        say(f"warning: {plain(warning)}")
    if wait:
        say(job["id"])
        _wait(job["id"], None, json)
    elif json:
        show_json(job)
    else:
        print(job["id"])


@group.command("wait")
def wait(job: JobId, timeout: Timeout = None, json: AsJson = False) -> None:
    """Wait for a job to end, showing its progress; survives restarts of the gateway.

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
    from tunesmith.output import say, session
    from tunesmith.wait import END, Exit, describe_end

    try:
        with session(timeout=30) as client:
            for event in follow(lambda seen: client.stream_events(job, seen), say):
                print(dumps(event) if json else _line(event), flush=True)
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

    with session() as client:
        found = list(client.jobs(limit))
    if json:
        show_json(found)
        return
    rows = [(job["id"], job.get("state") or job["status"], job["model"], job["fine_tuned_model"]) for job in found]
    show_table(("job", "state", "base", "model"), rows)


@group.command("show")
def show_job(job: JobId, json: AsJson = False) -> None:
    """One job, as JSON with or without --json."""
    from tunesmith.output import session, show_json

    with session() as client:
        show_json(client.job(job))


@group.command("events")
def list_events(job: JobId, limit: Annotated[int, typer.Option(min=1)] = 1000, json: AsJson = False) -> None:
    """What happened to a job, oldest first."""
    from tunesmith.output import session, show_json

    with session() as client:
        events = list(client.events(job, limit))[::-1]
    if json:
        show_json(events)
        return
    for event in events:
        print(_line(event))


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
    from tunesmith.output import session, show_json

    with session() as client:
        job = client.act(job_id, verb)
    if json:
        show_json(job)
    else:
        print(job.get("state") or job["status"])


def _line(event: dict[str, Any]) -> str:
    from tunesmith.output import plain

    when = datetime.fromtimestamp(event["created_at"]).strftime("%H:%M:%S")
    return f"{when} {event['level']:5} {plain(event['message'])}"


def _wait(job_id: str, timeout: float | None, json: bool) -> NoReturn:
    import os
    import sys

    from tunesmith.github import report
    from tunesmith.output import say, session, show_json
    from tunesmith.progress import watcher_for
    from tunesmith.wait import Exit, wait_for_job

    try:
        with session(timeout=30) as client, watcher_for(sys.stderr) as watcher:
            ending = wait_for_job(lambda: client.job(job_id), watcher, timeout=timeout)
    except KeyboardInterrupt:
        say(f"interrupted; the job goes on. To wait again: tunesmith wait {job_id}")
        raise SystemExit(Exit.INTERRUPTED) from None
    say(ending.message)
    try:
        report(job_id, ending, os.environ)
    except OSError as error:
        say(f"warning: GitHub's summary could not be written: {error}")
    if json and ending.job is not None:
        show_json(ending.job)
    raise SystemExit(int(ending.exit))
