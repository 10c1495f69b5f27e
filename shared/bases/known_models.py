"""`python -m shared.bases.known_models`: models that can be added to a catalogue by name alone, as JSON.

Owns `known_models.toml`. What may be trained and served is the catalogue's to say; nothing here is pinned.
"""

import json
import sys
import tomllib
from functools import cache
from pathlib import Path

from pydantic import Field

from shared.frozen import Frozen, ModuleName

FILE = Path(__file__).with_name("known_models.toml")


class KnownModel(Frozen):
    """A model of the hub.

    Attributes:
        parameters: how many, for people.
        gated: its owner must agree, and HF_TOKEN say who asks.
        target_modules: default LoRA targets of the `reference` preset, where they are not the catalogue's own.
    """

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")
    repo: str
    parameters: str
    gated: bool = False
    target_modules: tuple[ModuleName, ...] | None = None


class _File(Frozen):
    model: tuple[KnownModel, ...]


@cache
def known_models() -> tuple[KnownModel, ...]:
    return _File.model_validate(tomllib.loads(FILE.read_text())).model


def known_model(name: str) -> KnownModel | None:
    """The model of this id or repository, whatever its case; None if it is not known."""
    wanted = name.lower()
    return next((model for model in known_models() if wanted in (model.id, model.repo.lower())), None)


def main() -> int:
    print(json.dumps([model.model_dump(exclude_none=True) for model in known_models()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
