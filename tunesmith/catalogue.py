"""The base models of this installation, from the command line. `shared.bases` defines what a catalogue is.

The rule: the catalogue is the file `TUNESMITH_CATALOGUE` names; else `catalogue.toml` in the stack's folder, if it is
there; else the built-in list.
"""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tunesmith.local_stack.home import Home
from tunesmith.local_stack.plan import CHECKOUT, check_checkout, environment, python


class CatalogueError(Exception):
    """The catalogue could not be changed, or a base not prepared; the message says why."""


def add(home: Path, environ: Mapping[str, str], name: str, source: str, aliases: Sequence[str]) -> tuple[Path, str]:
    """Add a base model to the installation's catalogue.

    Args:
        source: `hub:<repo>`, `hub:<repo>@<branch, tag or commit>`, `folder:<path>` or `package:<package>/<file>.gguf`.

    Returns:
        The catalogue's file, and the source as it is written there: pinned to a commit, or a full path.

    Raises:
        CatalogueError: the name is taken, or the source is not there.
        CannotPlan: this is no checkout.
    """
    place = Home(home)
    path = Path(environ.get("TUNESMITH_CATALOGUE") or place.catalogue_file).absolute()
    if source.startswith("folder:"):
        # The child runs in another folder than the user's.
        source = "folder:" + str(Path(source.removeprefix("folder:")).absolute())
    return path, _run(place, environ, "shared.bases.catalogue_entry", str(path), name, source, *aliases)


def prepare(home: Path, environ: Mapping[str, str], name: str) -> str:
    """Bring a base model into the artifacts folder, as training and serving need it. Returns its id.

    Raises:
        CatalogueError: there is no such base, or it cannot be had.
        CannotPlan: this is no checkout.
    """
    return _run(Home(home), environ, "shared.bases.prepare", name)


def _run(place: Home, environ: Mapping[str, str], module: str, *arguments: str) -> str:
    check_checkout()
    done = subprocess.run(
        python(module, *arguments),
        env={**environ, **environment(place, environ)},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise CatalogueError(done.stderr.strip() or f"{module} ended with status {done.returncode}")
    return done.stdout.strip()
