"""The `tunesmith` command. Each command imports what it needs, so that `--help` comes at once."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Fine-tune language models with LoRA and serve the result, on your own machine.",
    epilog="The stack is found through .tunesmith/connection.json, or TUNESMITH_URL and TUNESMITH_API_KEY.",
)
jobs = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, show and steer fine-tuning jobs.")
models = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What can be trained and served.")
app.add_typer(jobs, name="jobs")
app.add_typer(models, name="models")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="ftjob-…")]
HomeOption = Annotated[Path, typer.Option(envvar="TUNESMITH_HOME", help="Folder of everything the stack keeps.")]
Timeout = Annotated[float | None, typer.Option(help="Stop waiting after so many seconds (exit 3); the job goes on.")]
DEFAULT_HOME = Path(".tunesmith")
DEFAULT_BASE = "smollm2-135m-instruct"


@app.command()
def up(
    home: HomeOption = DEFAULT_HOME,
    port: Annotated[int, typer.Option(help="Port of the gateway on 127.0.0.1; 0 for a free one.")] = 8000,
    base: Annotated[str, typer.Option(help="Model to serve: an id of the catalogue, or 'auto'.")] = DEFAULT_BASE,
    json: AsJson = False,
) -> None:
    """Start the whole stack on this machine, loopback only. Harmless if it runs."""
    from tunesmith import stack
    from tunesmith.output import fail, interrupt_on_sigterm, say, show_json

    interrupt_on_sigterm()
    try:
        started = stack.up(home, port=port, base=base, say=say)
    except stack.StackError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; nothing is left running", 130)
    connection = started.connection
    if json:
        show_json({"url": connection.url, "openai_base_url": connection.openai_base_url, "started": started.fresh})
        return
    say("the stack is up" if started.fresh else "the stack is running already")
    print(f"gateway     {connection.url}\nopenai      {connection.openai_base_url}\ndocs        {connection.url}/docs")
    print(f"connection  {home / 'connection.json'} (URL and API key)\nlogs        {home / 'logs'}")


@app.command()
def down(home: HomeOption = DEFAULT_HOME) -> None:
    """Stop it. A running job writes a checkpoint and goes on with the next 'up'."""
    from tunesmith import stack
    from tunesmith.output import fail, say

    try:
        say("stopped" if stack.down(home, say) else "nothing was running")
    except stack.StackError as error:
        fail(str(error))


@app.command()
def status(json: AsJson = False) -> None:
    """Whether the stack runs and can serve. Exit 0 if so, 1 if not."""
    from tunesmith.client import Client
    from tunesmith.connection import NoConnection, find
    from tunesmith.output import fail, show_json, show_table

    try:
        connection = find()
    except NoConnection as error:
        fail(str(error))
    with Client(connection, timeout=10) as client:
        ready = client.ready()
    alive = {name: _alive(pid) for name, pid in connection.pids.items()}
    if json:
        show_json({"url": connection.url, "ready": ready, "processes": alive, "pids": connection.pids})
    else:
        rows = [(name, "alive" if alive[name] else "gone", pid) for name, pid in connection.pids.items()]
        show_table(("process", "state", "pid"), [*rows, ("ready", "yes" if ready else "no", connection.url)])
    raise SystemExit(0 if ready and all(alive.values()) else 1)


@app.command()
def upload(file: Annotated[Path, typer.Argument(help="JSON lines or a JSON array.")], json: AsJson = False) -> None:
    """Upload a dataset; every row is checked. Prints the file's id."""
    from tunesmith.output import session, show_json

    with session(timeout=600) as client:
        answer = client.upload(file)
    if json:
        show_json(answer)
        return
    _describe_dataset(answer)
    print(answer["id"])


@app.command()
def train(
    file: Annotated[str, typer.Argument(help="A dataset to upload, or the id of one (file-…).")],
    model: Annotated[str, typer.Option(help="Base model.")] = DEFAULT_BASE,
    validation: Annotated[str | None, typer.Option(help="Held-out dataset: a file or an id.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Times through the data.")] = None,
    precision: Annotated[str, typer.Option(help="How the base is held: int8, nf4, bf16, fp16, fp32.")] = "int8",
    preset: Annotated[str, typer.Option(help="reference or recommended.")] = "reference",
    suffix: Annotated[str | None, typer.Option(help="A word in the new model's name.")] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    max_steps: Annotated[int | None, typer.Option(help="End after so many optimizer steps.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, as 'tunesmith wait' does.")] = False,
    json: AsJson = False,
) -> None:
    """Start a fine-tuning job. Prints its id."""
    from tunesmith.output import say, session, show_json

    with session(timeout=600) as client:
        hyperparameters = {"n_epochs": epochs, "learning_rate": learning_rate, "max_steps": max_steps}
        body = {
            "model": model,
            "training_file": _file_id(client, file),
            "validation_file": _file_id(client, validation) if validation else None,
            "suffix": suffix,
            "seed": seed,
            "base_precision": precision,
            "preset": preset,
            "hyperparameters": {name: value for name, value in hyperparameters.items() if value is not None} or None,
        }
        job = client.create_job({name: value for name, value in body.items() if value is not None})
    for warning in job.get("warnings") or []:
        say(f"warning: {warning}")
    if wait:
        say(job["id"])
        _wait(job["id"], None, json)
    elif json:
        show_json(job)
    else:
        print(job["id"])


@app.command()
def wait(job: JobId, timeout: Timeout = None, json: AsJson = False) -> None:
    """Wait for a job to end, showing its progress; survives restarts of the gateway.

    Exit codes: 0 succeeded, 1 could not tell, 2 usage, 3 timeout, 4 key refused or no such job, 5 failed, 6 cancelled,
    130 interrupted (the job goes on).
    """
    _wait(job, timeout, json)


@app.command()
def generate(
    prompt: str,
    adapter: Annotated[str | None, typer.Option(help="A fine-tuned model or checkpoint; the base if unsaid.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The prompt as it stands, without the model's template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: Annotated[float | None, typer.Option(help="Sample; greedy if unsaid.")] = None,
    json: AsJson = False,
) -> None:
    """Ask a model. Prints the text."""
    from tunesmith.output import session, show_json

    parameters = {"adapter_id": adapter, "max_new_tokens": max_new_tokens, "temperature": temperature}
    body: dict[str, Any] = {
        "inputs" if raw else "instruction": prompt,
        "parameters": {name: value for name, value in parameters.items() if value is not None},
    }
    with session(timeout=600) as client:
        answer, _ = client.generate(body)
    if json:
        show_json(answer)
    else:
        print(answer["generated_text"])


@jobs.command("list")
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


@jobs.command("show")
def show_job(job: JobId) -> None:
    """One job, as JSON."""
    from tunesmith.output import session, show_json

    with session() as client:
        show_json(client.job(job))


@jobs.command("events")
def list_events(job: JobId, limit: Annotated[int, typer.Option(min=1)] = 1000, json: AsJson = False) -> None:
    """What happened to a job, oldest first."""
    from datetime import datetime

    from tunesmith.output import plain, session, show_json

    with session() as client:
        events = list(client.events(job, limit))[::-1]
    if json:
        show_json(events)
        return
    for event in events:
        when = datetime.fromtimestamp(event["created_at"]).strftime("%H:%M:%S")
        print(f"{when} {event['level']:5} {plain(event['message'])}")


@jobs.command("cancel")
def cancel_job(job: JobId) -> None:
    """End a job; its checkpoints stay."""
    _act(job, "cancel")


@jobs.command("pause")
def pause_job(job: JobId) -> None:
    """Let a job write a checkpoint and wait."""
    _act(job, "pause")


@jobs.command("resume")
def resume_job(job: JobId) -> None:
    """Let a paused job go on."""
    _act(job, "resume")


@models.command("list")
def list_models(json: AsJson = False) -> None:
    """Bases, fine-tuned models and checkpoints."""
    from tunesmith.output import session, show_json, show_table

    with session() as client:
        found = client.models()
    if json:
        show_json(found)
    else:
        rows = [(model["id"], model.get("parent"), model.get("state")) for model in found]
        show_table(("model", "parent", "state"), rows)


def _act(job_id: str, verb: str) -> None:
    from tunesmith.output import session

    with session() as client:
        job = client.act(job_id, verb)
    print(job.get("state") or job["status"])


def _wait(job_id: str, timeout: float | None, json: bool) -> None:
    import sys

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
    if json and ending.job is not None:
        show_json(ending.job)
    raise SystemExit(int(ending.exit))


def _file_id(client: Any, named: str) -> str:
    """The id of a dataset that is on the server, or of a file that is uploaded for the purpose."""
    path = Path(named)
    if named.startswith("file-") and not path.exists():
        return named
    answer = client.upload(path)
    _describe_dataset(answer)
    return str(answer["id"])


def _describe_dataset(file: dict[str, Any]) -> None:
    from tunesmith.output import say

    dataset = file["dataset"]
    say(f"{file['filename']}: {dataset['rows']} {dataset['format']} rows, {dataset['duplicates']} duplicates")
    for warning in dataset["warnings"]:
        say(f"warning: {warning}")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def main() -> None:
    app()


if __name__ == "__main__":
    main()
