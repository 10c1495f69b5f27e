"""`up`, `down`, `status`, `doctor`, `adopt`, `backup`, `restore`: the stack on this machine."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from tunesmith.commands.options import DEFAULT_BASE, DEFAULT_HOME, AsJson, HomeOption


def up(
    home: HomeOption = DEFAULT_HOME,
    port: Annotated[
        int | None,
        typer.Option(
            help="Port of the gateway on 127.0.0.1; 0 for a free one. Unsaid: the last start's, at first 8000.",
            envvar="TUNESMITH_PORT",
            min=0,
            max=65535,
        ),
    ] = None,
    base: Annotated[str, typer.Option(help="Model to serve: an id of the catalogue, or 'auto'.")] = DEFAULT_BASE,
    engine: Annotated[
        Literal["own", "vllm"], typer.Option(help="What generates.", envvar="TUNESMITH_INFERENCE_ENGINE")
    ] = "own",
    vllm_python: Annotated[
        Path | None,
        typer.Option(help="Python of the environment that has vLLM.", envvar="TUNESMITH_VLLM_PYTHON"),
    ] = None,
    json: AsJson = False,
) -> None:
    """Start the whole stack on this machine, loopback only. Harmless if it runs."""
    from tunesmith.local_stack import stack
    from tunesmith.output import fail, interrupt_on_sigterm, say, show_json

    interrupt_on_sigterm()
    # Before the first folder is made: datasets and logs are nobody else's.
    os.umask(0o077)
    try:
        started = stack.up(home, port=port, base=base, engine=engine, vllm_python=vllm_python, say=say)
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


def down(home: HomeOption = DEFAULT_HOME, json: AsJson = False) -> None:
    """Stop it. A running job writes a checkpoint and goes on with the next 'up'."""
    from tunesmith.local_stack import stack
    from tunesmith.output import fail, say, show_json

    try:
        stopped = stack.down(home, say)
    except stack.StackError as error:
        fail(str(error))
    say("stopped" if stopped else "nothing was running")
    if json:
        show_json({"stopped": stopped})


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


def doctor(home: HomeOption = DEFAULT_HOME, json: AsJson = False) -> None:
    """Check this installation for faults, and say how to repair them. Exit 1 if something is."""
    from tunesmith.doctor import examine
    from tunesmith.output import plain, show_json

    findings = examine(home, os.environ)
    if json:
        show_json([finding.as_json() for finding in findings])
    else:
        for finding in findings:
            print(f"{finding.level:4}  {finding.subject}: {plain(finding.detail)}")
            if finding.remedy:
                print(f"      → {plain(finding.remedy)}")
    raise SystemExit(1 if any(finding.level == "fail" for finding in findings) else 0)


def adopt(home: HomeOption = DEFAULT_HOME) -> None:
    """Give the artifacts folder to this installation's database, after either was moved, copied or replaced.

    What the database does not know is garbage from then on: it goes into the folder's trash, and a week later for good.
    """
    from tunesmith.local_stack import stack
    from tunesmith.output import fail

    try:
        print(stack.adopt(home))
    except stack.StackError as error:
        fail(str(error))


def backup(
    file: Annotated[Path, typer.Argument(help="The file to write; it must not exist.")],
    home: HomeOption = DEFAULT_HOME,
    without_keys: Annotated[bool, typer.Option("--without-keys", help="Leave out API keys and their secret.")] = False,
) -> None:
    """Write datasets, adapters, jobs and keys to one file, which only you can read. The stack may go on meanwhile."""
    from tunesmith.local_stack import stack
    from tunesmith.output import fail

    try:
        print(stack.backup(home, file, keys=not without_keys))
    except stack.StackError as error:
        fail(str(error))


def restore(
    file: Annotated[Path, typer.Argument(help="What `tunesmith backup` has written.")],
    home: HomeOption = DEFAULT_HOME,
    replace: Annotated[
        bool, typer.Option("--replace", help="In the place of the installation backed up: its jobs go on here.")
    ] = False,
) -> None:
    """Make an installation in an empty home of a backup: a new one, whose unfinished jobs are paused."""
    from tunesmith.local_stack import stack
    from tunesmith.output import fail

    try:
        print(stack.restore(home, file, replace=replace))
    except stack.StackError as error:
        fail(str(error))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
