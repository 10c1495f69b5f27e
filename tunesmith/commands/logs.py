"""`logs`: what the services of the stack on this machine say, for people."""

from typing import Annotated

import typer

from tunesmith.commands.options import DEFAULT_HOME, HomeOption


def logs(
    service: Annotated[
        str | None, typer.Argument(help="gateway, trainer, inference, redis, supervisor, …; all if unsaid.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written from now on.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the newest to begin with.")] = 50,
    every: Annotated[bool, typer.Option("--all", help="Show GET requests that were answered, too.")] = False,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Show what the services have logged, newest last, with local times. The files are in the home's `logs`."""
    from tunesmith.local_stack.home import Home
    from tunesmith.local_stack.log_reader import last_lines, new_lines
    from tunesmith.output import fail

    folder = Home(home).logs
    found = sorted(folder.glob("*.log"))
    if not found:
        fail(f"no logs in {folder}: 'tunesmith up' makes them; --home names another folder")
    names = [log.stem for log in found]
    if service is not None and service not in names:
        fail(f"no log of {service!r}; there are: {', '.join(names)}")
    width = max(map(len, names))
    wanted = [log for log in found if service in (None, log.stem)]
    for line in last_lines(wanted, lines, lambda line: every or not line.is_poll):
        print(line.readable(width))
    if not follow:
        return
    try:
        for line in new_lines(lambda: [log for log in sorted(folder.glob("*.log")) if service in (None, log.stem)]):
            if every or not line.is_poll:
                print(line.readable(width), flush=True)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
