"""`models`: what can be trained and served."""

import os
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from tunesmith.commands import options
from tunesmith.commands.options import DEFAULT_HOME, AsJson, HomeOption

group = options.group("What can be trained and served.")
T = TypeVar("T")


@group.command("list")
def list_models(json: AsJson = False) -> None:
    """Bases, fine-tuned models and checkpoints.

    A base that is not prepared is downloaded or converted by the first job on it, or by 'tunesmith models prepare'.
    """
    from tunesmith.output import session, show_json, show_table

    with session() as client:
        found = client.models()
    if json:
        show_json(found)
    else:
        words: dict[Any, str] = {True: "yes", False: "no"}
        rows = [(m["id"], m.get("parent"), m.get("state"), words.get(m.get("prepared"))) for m in found]
        show_table(("model", "parent", "state", "prepared"), rows)


@group.command("delete")
def delete_model(
    model: Annotated[str, typer.Argument(help="A fine-tuned model or checkpoint.")], json: AsJson = False
) -> None:
    """Delete a fine-tuned model or a checkpoint everywhere. Requests in flight finish on it."""
    from tunesmith.output import session, show_json

    with session() as client:
        answer = client.delete_model(model)
    if json:
        show_json(answer)
    else:
        print(answer["id"])


@group.command("add")
def add_model(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="What jobs will call it; without --source a known model, or a repository of the hub (owner/name).",
        ),
    ],
    source: Annotated[
        str, typer.Option(help="hub:REPO[@REVISION], folder:PATH (transformers' form) or package:PACKAGE/FILE.gguf.")
    ] = "",
    alias: Annotated[list[str] | None, typer.Option(help="Another name; may be given several times.")] = None,
    home: HomeOption = DEFAULT_HOME,
    json: AsJson = False,
) -> None:
    """Add a base model to this installation's catalogue, pinned. A running stack knows it from its next start.

    The catalogue is the file TUNESMITH_CATALOGUE names, else catalogue.toml in the stack's folder, which begins as a
    copy of the built-in list. Private and gated models of the hub need HF_TOKEN.
    """
    from tunesmith import catalogue
    from tunesmith.output import say, show_json

    path, entry = _done(lambda: catalogue.add(home, os.environ, name, source, alias or []))
    added = entry["id"]
    say(f"{path}: {entry['source']}")
    say(f"next: tunesmith models prepare {added}; a running stack knows it after 'tunesmith down' and 'tunesmith up'")
    if json:
        show_json({**entry, "catalogue": str(path)})
    else:
        print(added)


@group.command("known")
def known_models(home: HomeOption = DEFAULT_HOME, json: AsJson = False) -> None:
    """Models of the hub that 'tunesmith models add' takes by name. The gated ones need HF_TOKEN."""
    from tunesmith import catalogue
    from tunesmith.output import show_json, show_table

    found = _done(lambda: catalogue.known(home, os.environ))
    if json:
        show_json(found)
    else:
        rows = [(m["id"], m["repo"], m["parameters"], "yes" if m["gated"] else "no") for m in found]
        show_table(("model", "repository", "parameters", "gated"), rows)


@group.command("prepare")
def prepare_model(
    name: Annotated[str, typer.Argument(metavar="ID", help="An id or alias of the catalogue.")],
    home: HomeOption = DEFAULT_HOME,
    json: AsJson = False,
) -> None:
    """Download or convert a base model now; else the first job on it does. Harmless if it is there."""
    from tunesmith import catalogue
    from tunesmith.output import show_json

    prepared = _done(lambda: catalogue.prepare(home, os.environ, name))
    if json:
        show_json({"id": prepared, "prepared": True})
    else:
        print(prepared)


def _done(work: Callable[[], T]) -> T:
    from tunesmith.catalogue import CatalogueError
    from tunesmith.local_stack.plan import CannotPlan
    from tunesmith.output import fail

    try:
        return work()
    except (CatalogueError, CannotPlan) as error:
        fail(str(error))
