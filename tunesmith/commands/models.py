"""`models`: what can be trained and served."""

from typing import Annotated

import typer

from tunesmith.commands import options
from tunesmith.commands.options import AsJson

group = options.group("What can be trained and served.")


@group.command("list")
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
