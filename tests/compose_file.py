"""Reads docker-compose.yml and the Dockerfiles as Docker would, as far as these files go."""

import fnmatch
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.stack_processes import ROOT

_VARIABLE = re.compile(r"\$(?:\$|\{(?P<name>\w+)(?:(?P<how>:?[-?])(?P<word>[^}]*))?\})")


def _matching(source: str) -> list[str]:
    """What a COPY takes: a pattern may match nothing."""
    if "[" not in source:
        return [source]
    return [str(path.relative_to(ROOT)) for path in ROOT.glob(source)]


class Unset(Exception):
    """A variable that compose insists on."""


def interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    """`value` with `$$`, `${V}`, `${V:-default}` and `${V:?message}` replaced in every string, as compose does.

    Raises:
        Unset: a `:?` variable is unset or empty.
    """

    def one(found: re.Match[str]) -> str:
        if found["name"] is None:
            return "$"
        given = variables.get(found["name"], "")
        if given:
            return given
        if (found["how"] or "").endswith("?"):
            raise Unset(f"{found['name']}: {found['word']}")
        return found["word"] or ""

    if isinstance(value, str):
        return _VARIABLE.sub(one, value)
    if isinstance(value, dict):
        return {key: interpolated(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolated(item, variables) for item in value]
    return value


def read_compose(variables: Mapping[str, str]) -> dict[str, Any]:
    """The compose file with `variables` filled in. Raises Unset."""
    return {
        key: interpolated(value, variables)
        for key, value in yaml.safe_load((ROOT / "docker-compose.yml").read_text()).items()
        if not key.startswith("x-")
    }


def in_profile(compose: Mapping[str, Any], profile: str) -> dict[str, dict[str, Any]]:
    """The services `docker compose --profile …` starts."""
    services: dict[str, dict[str, Any]] = compose["services"]
    return {name: one for name, one in services.items() if profile in one.get("profiles", [profile])}


@dataclass
class Dockerfile:
    """One image's recipe.

    Attributes:
        instructions: (name, arguments) in order, line continuations joined, comments left out.
    """

    path: Path
    instructions: list[tuple[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        lines = [line for line in self.path.read_text().splitlines() if not line.lstrip().startswith("#")]
        joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
        parts = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
        self.instructions = [(name, rest.strip()) for name, rest in parts]

    def all(self, name: str) -> list[str]:
        return [arguments for instruction, arguments in self.instructions if instruction == name]

    def only(self, name: str) -> str:
        (arguments,) = self.all(name)
        return arguments

    @property
    def command(self) -> list[str]:
        command: list[str] = json.loads(self.only("CMD"))
        return command

    @property
    def environment(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for line in self.all("ENV") for pair in line.split())

    def copies(self) -> list[tuple[list[str], str]]:
        """(sources, target) of every COPY."""
        lines = [line.split() for line in self.all("COPY")]
        return [([name for source in words[:-1] for name in _matching(source)], words[-1]) for words in lines]

    def assemble(self, folder: Path) -> None:
        """Put into `folder` what the image has in its working directory: what is copied, and nothing else."""
        ignored = [line.strip() for line in (ROOT / ".dockerignore").read_text().splitlines() if line.strip()]
        for sources, target in self.copies():
            for source in sources:
                top = source.split("/")[0]
                assert not any(fnmatch.fnmatch(top, rule) for rule in ignored), f"{source} is not in the context"
                origin, place = ROOT / source, folder / target
                if origin.is_dir():
                    shutil.copytree(origin, place, ignore=shutil.ignore_patterns("__pycache__"))
                    continue
                if target.endswith("/"):
                    place = place / origin.name
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(origin, place)
