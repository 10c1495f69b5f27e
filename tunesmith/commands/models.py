"""`models`: what can be trained and served."""

import os
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from tunesmith import completion
from tunesmith.commands import options
from tunesmith.commands.options import ADAPTER, DEFAULT_HOME, AsJson, HomeOption

group = options.group("What can be trained and served.")
T = TypeVar("T")


@group.command("list")
def list_models(
    all: Annotated[bool, typer.Option("--all", help="Checkpoints, too.")] = False, json: AsJson = False
) -> None:
    """Bases and fine-tuned models.

    A base that is not prepared is downloaded or converted by the first job on it, or by 'tunesmith models prepare'.
    """
    from tunesmith.output import say, session, show_json, show_table

    with session() as client:
        every = client.models()
    found = [model for model in every if all or model.get("kind") != "checkpoint"]
    if json:
        show_json(found)
    else:
        words: dict[Any, str] = {True: "yes", False: "no"}
        rows = [(m["id"], m.get("parent"), m.get("state"), words.get(m.get("prepared"))) for m in found]
        show_table(("model", "parent", "state", "prepared"), rows)
        if hidden := len(every) - len(found):
            say(f"{_checkpoints(hidden)} not shown: --all shows all")


@group.command("delete")
def delete_model(
    model: Annotated[str, typer.Argument(help=f"{ADAPTER}.", autocompletion=completion.adapters)],
    json: AsJson = False,
) -> None:
    """Delete a fine-tuned model and its job's checkpoints, or one checkpoint, everywhere. Requests in flight finish."""
    from tunesmith.output import full_model, plain, say, session, show_json

    with session() as client:
        full = full_model(client, model)
        checkpoints = [
            each["id"]
            for each in client.models()
            if each.get("kind") == "checkpoint" and each["id"].startswith(f"{full}:ckpt-step-")
        ]
        # The model last: until it is gone, the same command finds what is left.
        answers = [client.delete_model(each) for each in (*checkpoints, full)]
    freed = sum(answer.get("freed_bytes") or 0 for answer in answers)
    if json:
        show_json({**answers[-1], "checkpoints": checkpoints, "freed_bytes": freed})
        return
    with_checkpoints = f" with {_checkpoints(len(checkpoints))}" if checkpoints else ""
    say(f"deleted{with_checkpoints}; {freed / 1e6:.1f} MB freed")
    print(plain(answers[-1]["id"]))


@group.command("prune")
def prune_checkpoints(
    yes: Annotated[bool, typer.Option("--yes", help="Delete them; else they are listed only.")] = False,
    json: AsJson = False,
) -> None:
    """Delete the checkpoints of all models that are done: the models stay, and so do checkpoints without one."""
    from tunesmith.client import ApiError
    from tunesmith.output import plain, say, session, show_json

    gone, freed = [], 0
    with session() as client:
        models = client.models()
        whole = {model["id"] for model in models if model.get("kind") == "adapter"}
        checkpoints = [model["id"] for model in models if model.get("kind") == "checkpoint"]
        found = [name for name in checkpoints if name.partition(":ckpt-step-")[0] in whole]
        for name in found if yes else ():
            try:
                freed += client.delete_model(name).get("freed_bytes") or 0
            except ApiError as error:
                # A job that goes on from it keeps it; somebody else may have been faster.
                if error.code not in ("model_in_use", "model_not_found"):
                    raise
                say(f"warning: {plain(error.message)}")
            else:
                gone.append(name)
    if json:
        show_json({"checkpoints": gone if yes else found, "deleted": yes, "freed_bytes": freed})
        return
    for name in gone if yes else found:
        print(plain(name))
    if yes:
        say(f"{_checkpoints(len(gone))} deleted; {freed / 1e6:.1f} MB freed")
    elif found:
        say(f"{_checkpoints(len(found))} would be deleted\nnext: tunesmith models prune --yes")
    else:
        say("there is no checkpoint to delete")


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


def _checkpoints(count: int) -> str:
    return f"{count} checkpoint{'' if count == 1 else 's'}"


def _done(work: Callable[[], T]) -> T:
    from tunesmith.catalogue import CatalogueError
    from tunesmith.local_stack.plan import CannotPlan
    from tunesmith.output import fail

    try:
        return work()
    except (CatalogueError, CannotPlan) as error:
        fail(str(error))
