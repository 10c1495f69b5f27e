"""`python -m shared.bases.catalogue_entry FILE NAME SOURCE [ALIAS…]`: add one base model to a catalogue file.

An empty SOURCE takes a known model by its id or repository, or any repository of the hub by its name.

A file that is not there yet begins as a copy of the built-in list, so that it is always the whole truth. Prints the
entry as JSON: a hub's branch has become the commit it stands for now.
"""

import fcntl
import importlib.util
import json
import os
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from shared.bases.catalogue import BUILT_IN, Base, parse_catalogue
from shared.bases.known_models import known_model
from shared.errors import TunesmithError

_HUB = re.compile(r"hub:(?P<repo>[^@\s]+)(@(?P<revision>\S+))?")
_REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def add_base(path: Path, base: Base) -> None:
    """Write `base` at the end of a catalogue file, whole or not at all; what is in it stays as it is, comments too.

    Raises:
        TunesmithError: the file is malformed, or the base does not fit into it (a name that is taken).
    """
    with _locked(path.parent):
        before = (path if path.exists() else BUILT_IN).read_text()
        text = before.rstrip("\n") + "\n\n" + as_toml(base)
        parse_catalogue(text, str(path))
        _replace(path, text)


def as_toml(base: Base) -> str:
    """A `[[base]]` table of the fields that were set; fields left at their defaults are not written."""
    fields = base.model_dump(exclude_unset=True)
    lines = [f"{name} = {_value(value)}" for name, value in fields.items() if value != ()]
    return "\n".join(["[[base]]", *lines]) + "\n"


def entry_of(name: str, source: str, aliases: tuple[str, ...]) -> Base:
    """The entry that a name and a source ask for.

    Raises:
        TunesmithError: there is no source, and the name is neither a known model's nor a repository's.
    """
    if source:
        return Base(id=name, source=pinned(source), aliases=aliases)
    model = known_model(name)
    if model is None and not _REPO.fullmatch(name):
        raise TunesmithError(
            f"{name} is no known model (tunesmith models known): say where it is with --source, or name a repository "
            "of the hub as owner/name",
            code="catalogue",
        )
    repo = model.repo if model else name
    own = model.id if model else repo.rpartition("/")[2].lower().replace("_", "-")
    targets = {"target_modules": model.target_modules} if model and model.target_modules else {}
    return Base.model_validate({"id": own, "source": pinned(f"hub:{repo}"), "aliases": (repo, *aliases), **targets})


def pinned(source: str) -> str:
    """A source as the catalogue wants it: a hub's branch or tag replaced by its commit, a folder by its full path.

    Raises:
        TunesmithError: what it names is not there, or not a model.
    """
    kind, _, rest = source.partition(":")
    if kind == "folder":
        return f"folder:{_checked_folder(Path(rest).absolute())}"
    if kind == "package" and importlib.util.find_spec(rest.partition("/")[0] or "-") is None:
        raise TunesmithError(f"{source}: the Python package is not installed", code="catalogue")
    if (hub := _HUB.fullmatch(source)) and not _COMMIT.fullmatch(hub["revision"] or ""):
        from shared.bases.hub import commit_of

        return f"hub:{hub['repo']}@{commit_of(hub['repo'], hub['revision'])}"
    return source


def _checked_folder(folder: Path) -> Path:
    wanted = ("config.json", "tokenizer.json", "*.safetensors")
    missing = [name for name in wanted if not any(folder.glob(name))]
    if missing:
        raise TunesmithError(
            f"{folder} is no model that can be used: it has no {', no '.join(missing)}", code="catalogue"
        )
    return folder


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    # JSON's escapes are TOML's; TOML wants DEL escaped too (toml.io, "String").
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: two processes that add at once must not lose one another's entry."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    staged = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with staged.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def main() -> int:
    path, name, source, *aliases = sys.argv[1:]
    try:
        base = entry_of(name, source, tuple(aliases))
        add_base(Path(path), base)
    except ValidationError as error:
        first = error.errors()[0]
        print(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", file=sys.stderr)
        return 1
    except (TunesmithError, OSError, ValueError) as error:
        print(getattr(error, "message", error), file=sys.stderr)
        return 1
    print(json.dumps({"id": base.id, "source": base.source, "aliases": base.aliases}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
