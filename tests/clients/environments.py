"""An environment for each client under .venv-clients, made when it is first needed and whenever a pin changes."""

import json
import os
import shutil
import subprocess
import tomllib
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.stack_processes import ROOT, clean_environment

HERE = Path(__file__).parent
ENVIRONMENTS = ROOT / ".venv-clients"
INSTALL_SECONDS = 1800
RUN_SECONDS = 600


@dataclass(frozen=True)
class Client:
    """One client and the program that uses it.

    Attributes:
        pip, npm: pinned packages; one of the two is empty.
    """

    name: str
    program: str
    pip: tuple[str, ...] = ()
    npm: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return ENVIRONMENTS / self.name.replace(" ", "-").replace("/", "-")

    def install(self) -> None:
        """Make the environment, unless it is there with these very pins."""
        wanted = json.dumps([self.pip, self.npm])
        stamp = self.folder / "installed.json"
        if stamp.is_file() and stamp.read_text() == wanted:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.npm:
            self.folder.mkdir(parents=True)
            (self.folder / "package.json").write_text('{"private": true}')
            _run(["npm", "install", "--no-audit", "--no-fund", "--save-exact", *self.npm], self.folder)
        else:
            venv.create(self.folder, with_pip=True)
            _run([str(self.folder / "bin" / "pip"), "install", "--quiet", *self.pip], self.folder)
        stamp.write_text(wanted)

    def run(self, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """The program in its environment, with the server's address in `variables`."""
        program = HERE / "programs" / self.program
        if self.npm:
            # Node looks for packages from where a module lies.
            program = Path(shutil.copy(program, self.folder))
            command = ["node", str(program)]
        else:
            command = [str(self.folder / "bin" / "python"), str(program)]
        environment = {name: value for name, value in clean_environment().items() if name != "PYTHONPATH"}
        return subprocess.run(
            command,
            cwd=self.folder,
            env=environment | dict(variables),
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
        )


def read_clients() -> list[Client]:
    entries = tomllib.loads((HERE / "clients.toml").read_text())["client"]
    return [
        Client(entry["name"], entry["program"], tuple(entry.get("pip", ())), tuple(entry.get("npm", ())))
        for entry in entries
    ]


def _run(command: list[str], folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
