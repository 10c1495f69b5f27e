"""The `tunesmith` command. Each subcommand imports what it needs when it runs, so that `--help` is fast."""

from collections.abc import Callable
from typing import Annotated

import typer

from tunesmith.commands import before, files, jobs, keys, logs, models, stack, talk

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Fine-tune language models with LoRA and serve the result, on your own machine.",
    epilog="The stack is found through .tunesmith/connection.json, or TUNESMITH_URL and TUNESMITH_API_KEY.",
)
COMMANDS: tuple[Callable[..., None], ...] = (
    *(stack.up, stack.down, stack.status, stack.doctor, stack.adopt, stack.backup, stack.restore, logs.logs),
    *(files.upload, before.preview, before.estimate, jobs.train, jobs.wait, talk.generate, talk.chat),
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"tunesmith {version('tunesmith')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


for command in COMMANDS:
    app.command()(command)
for name, group in (("jobs", jobs.group), ("models", models.group), ("files", files.group), ("keys", keys.group)):
    app.add_typer(group, name=name)


def main() -> None:
    # Completion asks for the command by this name, however Python was started.
    app(prog_name="tunesmith")


if __name__ == "__main__":
    main()
