"""`keys`: API keys of the stack on this machine. Whoever may read its database needs no key for this."""

from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.commands.options import DEFAULT_HOME, AsJson, HomeOption
from tunesmith.commands.options import group as new_group

group = new_group("API keys: make, list and revoke them. On the machine of the stack; needs its home and no key.")


@group.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Whose it is or what for: a-z, 0-9, '.', '_', '-'.")],
    project: Annotated[str, typer.Option(help="Files, jobs and models are seen within one project only.")] = "default",
    here: Annotated[bool, typer.Option("--here", help="Let the commands on this machine use it from now on.")] = False,
    home: HomeOption = DEFAULT_HOME,
    json: AsJson = False,
) -> None:
    """Make a key and print it: the only time that anybody sees it."""
    from tunesmith.output import say, show_json

    options = ("--project", project, *(("--here",) if here else ()))
    made = _asked(home, "create", name, *options)
    if here:
        _use(home, made["key"])
    if json:
        show_json(made)
        return
    say(f"{made['id']}, project {project}" + (f"; kept in {made['file']}" if here else "; it is kept nowhere: note it"))
    print(made["key"])


@group.command("list")
def list_(home: HomeOption = DEFAULT_HOME, json: AsJson = False) -> None:
    """List every key that was ever made, oldest first, without the keys themselves."""
    from tunesmith.output import show_json, show_table

    found = _asked(home, "list")["data"]
    if json:
        show_json(found)
        return
    rows = [(key["id"], key["project"], _when(key["created_at"]), _when(key["revoked_at"])) for key in found]
    show_table(("key", "project", "created", "revoked"), rows)


@group.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY", help="key-…, as listed; not the key itself.")],
    home: HomeOption = DEFAULT_HOME,
    json: AsJson = False,
) -> None:
    """Refuse a key from the next request on, for good."""
    from tunesmith.output import say, show_json

    done = _asked(home, "revoke", key)
    if json:
        show_json(done)
        return
    print(f"{done['id']} {'is revoked' if done['revoked'] else 'was revoked before'}")
    if not done["live"]:
        say("no key is left; a new one for this machine: tunesmith keys create NAME --here")


@group.command("new-secret")
def new_secret(home: HomeOption = DEFAULT_HOME, json: AsJson = False) -> None:
    """Revoke all keys and make a first one under a new secret: the way back when key_secret is lost or known to others.

    Jobs, files and models stay. The stack must be down; with TUNESMITH_KEY_SECRET set, that is the new secret.
    """
    from tunesmith.local_stack.home import Home
    from tunesmith.output import fail, say, show_json

    if Home(home).is_running():
        fail("the stack runs with the old secret: first 'tunesmith down'")
    made = _asked(home, "new-secret")
    if json:
        show_json(made)
        return
    say(f"{made['revoked']} keys are revoked; {made['id']} is in {made['file']}, and 'tunesmith up' uses it")
    print(made["key"])


def _asked(home: Path, *arguments: str) -> dict[str, Any]:
    from tunesmith.local_stack import stack
    from tunesmith.output import fail

    try:
        return stack.keys(home, *arguments)
    except stack.StackError as error:
        fail(str(error))


def _use(home: Path, key: str) -> None:
    """Put a key into the connection file of a stack that runs."""
    from tunesmith import connection as connections
    from tunesmith.local_stack.home import Home

    file = Home(home).connection_file
    with suppress(connections.NoConnection):
        replace(connections.read(file), api_key=key).write(file)


def _when(seconds: int | None) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M") if seconds else "-"
