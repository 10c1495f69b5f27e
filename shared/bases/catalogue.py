"""Which base models exist. Owns `catalogue.toml` and where each base comes from; `shared.bases.base_model` loads."""

import hashlib
import re
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from shared.bases.known_models import known_model
from shared.errors import InvalidRequest, NotFound, TunesmithError
from shared.frozen import Frozen, ModuleName
from shared.jobs.spec import BasePrecision

BUILT_IN = Path(__file__).with_name("catalogue.toml")
_SOURCES = (
    re.compile(r"hub:(?P<repo>\w[\w.-]*/\w[\w.-]*)@(?P<revision>[0-9a-f]{40})"),
    re.compile(r"folder:(?P<path>/[^\x00]+)"),
    re.compile(r"package:(?P<package>[a-z_][a-z0-9_]*)/(?P<file>[\w.-]+\.gguf)"),
)


class Base(Frozen):
    """One base model.

    Attributes:
        source: where it is prepared from; `hub:<repo>@<commit>`, `folder:<path>` or `package:<package>/<file>.gguf`.
        aliases: other names clients may use, such as the hub's.
        precisions: what a job may ask for.
        target_modules: default LoRA targets of the `reference` preset.
    """

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")
    source: str
    aliases: tuple[str, ...] = ()
    precisions: tuple[BasePrecision, ...] = ("int8", "nf4", "bf16", "fp16", "fp32")
    target_modules: tuple[ModuleName, ...] = ("q_proj", "v_proj")

    @property
    def revision(self) -> str:
        """What pins the base's content: the hub's commit, or a digest of a local source's name."""
        if self.source.startswith("hub:"):
            return self.source.rsplit("@", 1)[1]
        return hashlib.sha256(self.source.encode()).hexdigest()[:40]


class _File(Frozen):
    base: Annotated[tuple[Base, ...], Field(min_length=1)]


class Catalogue:
    """The base models of one installation, by id and alias."""

    def __init__(self, bases: tuple[Base, ...]) -> None:
        self.bases = bases
        self._by_name: dict[str, Base] = {}
        for base in bases:
            if not any(pattern.fullmatch(base.source) for pattern in _SOURCES):
                raise TunesmithError(
                    f"catalogue: {base.id}: source {base.source!r} is of no known form", code="catalogue"
                )
            for name in (base.id, *base.aliases):
                if name in self._by_name:
                    raise TunesmithError(f"catalogue: {name!r} is listed twice", code="catalogue")
                self._by_name[name] = base

    def get(self, name: str) -> Base:
        """The base called `name` (id or alias).

        Raises:
            NotFound: it is not in the catalogue.
        """
        base = self._by_name.get(name)
        if base is None:
            there = ", ".join(b.id for b in self.bases)
            addable = known_model(name)
            how = f"; whoever runs this server can add it: tunesmith models add {addable.id}" if addable else ""
            raise NotFound(
                f"no base model {name[:100]!r} in the catalogue; there are: {there}{how}", code="model_not_found"
            )
        return base

    def get_for_job(self, name: str) -> Base:
        """As `get`, for a request body's `model` field.

        Raises:
            InvalidRequest: it is not in the catalogue.
        """
        try:
            return self.get(name)
        except NotFound as error:
            raise InvalidRequest(error.message, param="model", code="model_not_found") from None


def load_catalogue(path: Path | None = None) -> Catalogue:
    """Read a catalogue file, the built-in one if `path` is None.

    Raises:
        TunesmithError: the file is missing or malformed; the message names the entry.
    """
    path = path or BUILT_IN
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise TunesmithError(f"catalogue {path}: {error}", code="catalogue") from error
    return parse_catalogue(text, str(path))


def parse_catalogue(text: str, name: str) -> Catalogue:
    """The catalogue that a file's text says.

    Args:
        name: the file, for messages.

    Raises:
        TunesmithError: malformed; the message names the entry.
    """
    try:
        return Catalogue(_File.model_validate(tomllib.loads(text)).base)
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise TunesmithError(f"catalogue {name}: {error}", code="catalogue") from error
