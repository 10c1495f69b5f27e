"""The base models of this installation, from the command line. `shared.bases` defines what a catalogue is.

The rule: the catalogue is the file `TUNESMITH_CATALOGUE` names; else `catalogue.toml` in the stack's folder, if it is
there; else the built-in list.
"""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.local_stack.home import Home
from tunesmith.local_stack.plan import CHECKOUT, check_checkout, environment, python


class CatalogueError(Exception):
    """The catalogue could not be changed, or a base not prepared; the message says why."""


def add(
    home: Path, environ: Mapping[str, str], name: str, source: str, aliases: Sequence[str]
) -> tuple[Path, dict[str, Any]]:
    """Add a base model to the installation's catalogue.

    Args:
        source: `hub:<repo>`, `hub:<repo>@<branch, tag or commit>`, `folder:<path>` or `package:<package>/<file>.gguf`;
            empty if `name` says it, as that of a known model or of the hub's repository.

    Returns:
        The catalogue's file; and `id`, `source` and `aliases` as they are written there, pinned to a commit or a path.

    Raises:
        CatalogueError: the name is taken, or the source is not there.
        CannotPlan: this is no checkout.
    """
    place = Home(home)
    path = Path(environ.get("TUNESMITH_CATALOGUE") or place.catalogue_file).absolute()
    if source.startswith("folder:"):
        # The child runs in another folder than the user's.
        source = "folder:" + str(Path(source.removeprefix("folder:")).absolute())
    entry = _run(place, environ, "shared.bases.catalogue_entry", str(path), name, source, *aliases)
    return path, json.loads(entry)


def known(home: Path, environ: Mapping[str, str]) -> list[dict[str, Any]]:
    """Models that can be added by name: `id`, `repo`, `parameters` and whether they are `gated`.

    Raises:
        CannotPlan: this is no checkout.
    """
    found: list[dict[str, Any]] = json.loads(_run(Home(home), environ, "shared.bases.known_models"))
    return found


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
