"""A whole stack on this machine: start it and stop it.

Owns the order (lock, base model, schema, processes) and the messages when something goes wrong.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import urlsplit

from tunesmith import connection as connections
from tunesmith.connection import Connection, NoConnection
from tunesmith.local_stack.home import Home
from tunesmith.local_stack.log_tail import log_tail
from tunesmith.local_stack.plan import (
    CHECKOUT,
    CannotPlan,
    check_checkout,
    checked_port,
    checked_vllm_python,
    environment,
    make_plan,
    python,
)
from tunesmith.local_stack.supervisor import encode

DEFAULT_BASE = "smollm2-135m-instruct"
DEFAULT_PORT = 8000
STOP_SECONDS = 180.0
GONE_SECONDS = 20.0
Say = Callable[[str], None]
Engine = Literal["own", "vllm"]


class StackError(Exception):
    """The stack did not start or stop; the message says why and holds the end of the log at fault."""


@dataclass(frozen=True, slots=True)
class Started:
    """What `up` did.

    Attributes:
        fresh: false if the stack was running already.
    """

    connection: Connection
    fresh: bool


def up(
    home: Path,
    *,
    port: int | None = None,
    base: str = DEFAULT_BASE,
    engine: Engine = "own",
    vllm_python: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    say: Say = lambda line: None,
) -> Started:
    """Start everything and wait until it can work; harmless if it runs.

    Args:
        home: folder of everything this stack keeps; several stacks live side by side in several folders.
        port: of the gateway on 127.0.0.1; 0 for a free one, None for the one it had last time (8000 the first time).
        base: catalogue id or alias of the model served, or `auto` for the first in the catalogue that can be had.
        engine: what generates: the inference process itself, or a vLLM server beside it.
        vllm_python: of the environment that has vLLM; None is that of `make .venv-vllm/ready`.
        environ: what the processes inherit; `TUNESMITH_DATABASE_URL`, `TUNESMITH_CATALOGUE` and the like are passed on.
        say: called with each line of progress.

    Raises:
        StackError: it did not start; nothing is left running.
    """
    place = Home(home)
    try:
        check_checkout()
        port = usual_port(place) if port is None else port
        if port and not place.is_running():
            # Before anything is made: a base takes minutes.
            checked_port(port)
        vllm_python = checked_vllm_python(vllm_python) if engine == "vllm" else None
        while (lock := place.acquire()) is None:
            # It runs, starts or stops: the file is there or will be, or the lock becomes free.
            with contextlib.suppress(NoConnection):
                return Started(connections.read(place.connection_file), fresh=False)
            time.sleep(0.1)
        try:
            return Started(_start(place, lock, port, base, vllm_python, environ, say), fresh=True)
        finally:
            os.close(lock)
    except CannotPlan as error:
        raise StackError(str(error)) from error


def usual_port(place: Home) -> int:
    """The gateway's port where none is named."""
    return place.remembered_port() or DEFAULT_PORT


def down(home: Path, say: Say = lambda line: None) -> bool:
    """Stop everything and wait until it is gone. Running jobs are checkpointed and go on with the next `up`.

    Returns:
        Whether something was running.

    Raises:
        StackError: something is still running.
    """
    place = Home(home)
    if not place.is_running():
        place.connection_file.unlink(missing_ok=True)
        return False
    pids = _known_pids(place)
    supervisor = place.supervisor_pid()
    if supervisor is not None:
        say("stopping; a running job writes a checkpoint first")
        with contextlib.suppress(ProcessLookupError):
            os.kill(supervisor, signal.SIGTERM)
    if not place.wait_until_free(STOP_SECONDS):
        raise StackError(f"still running after {STOP_SECONDS:g} s; see {place.log('supervisor')}")
    place.connection_file.unlink(missing_ok=True)
    if left := _left_of(pids):
        raise StackError(f"still running: {left}")
    return True


def adopt(home: Path, environ: Mapping[str, str] = os.environ) -> str:
    """Give the artifacts folder to this installation's database. Returns what was done, as a sentence.

    Raises:
        StackError: it could not be.
    """
    return _run_beside(Home(home), environ, "shared.adopt")


def backup(home: Path, file: Path, *, keys: bool = True, environ: Mapping[str, str] = os.environ) -> str:
    """Write all that this installation cannot make again to a file; it may go on meanwhile. Returns what was done.

    Raises:
        StackError: it could not be.
    """
    without = () if keys else ("--without-keys",)
    return _run_beside(Home(home), environ, "services.gateway.backup", "take", str(file.absolute()), *without)


def restore(home: Path, file: Path, *, replace: bool = False, environ: Mapping[str, str] = os.environ) -> str:
    """Make an installation in an empty home of a backup. Returns what was done, as a sentence.

    Raises:
        StackError: it could not be.
    """
    place = Home(home)
    if place.is_running():
        raise StackError("a stack runs there: restore into another home")
    options = ("--replace",) if replace else ()
    return _run_beside(place, environ, "services.gateway.backup", "restore", str(file.absolute()), *options)


def keys(home: Path, *arguments: str, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What `python -m services.gateway.keys_admin` answers, on the database of this home.

    Raises:
        StackError: it refuses, or there is no database yet.
    """
    place = Home(home)
    database = place.root / "tunesmith.db"
    if not environ.get("TUNESMITH_DATABASE_URL") and not database.exists():
        raise StackError(f"there is no {database}: 'tunesmith up' makes it; --home names another folder")
    answer: dict[str, Any] = json.loads(_beside(place, environ, "services.gateway.keys_admin", *arguments).stdout)
    return answer


def _run_beside(place: Home, environ: Mapping[str, str], module: str, *arguments: str) -> str:
    """Run a module of the services with the stack's settings. Returns what it printed."""
    done = _beside(place, environ, module, *arguments)
    return "\n".join(part for part in (done.stderr.strip(), done.stdout.strip()) if part)


def _beside(place: Home, environ: Mapping[str, str], module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module of the services with the stack's settings.

    Raises:
        StackError: it fails; with what it says.
    """
    try:
        check_checkout()
    except CannotPlan as error:
        raise StackError(str(error)) from error
    env = {**environ, **environment(place, environ)}
    done = subprocess.run(python(module, *arguments), env=env, cwd=CHECKOUT, capture_output=True, text=True)
    if done.returncode != 0:
        raise StackError(done.stderr.strip())
    return done


def _start(
    place: Home, lock: int, port: int, base: str, vllm_python: Path | None, environ: Mapping[str, str], say: Say
) -> Connection:
    # One that a killed stack left here is out of date.
    place.connection_file.unlink(missing_ok=True)
    common = environment(place, environ)
    env = {**environ, **common}
    say(f"preparing base model {base} (once; later starts only check it)")
    base = _run_step(place, "prepare", python("shared.bases.prepare", base), env).strip()
    _run_step(place, "migrate", python("shared.migrations"), env)
    plan = make_plan(place, port, base, common, vllm_python)
    say(f"starting {', '.join(child.name for child in plan.children)}; waiting for {', '.join(plan.ready)}")
    _launch(place, lock, encode(plan), env, say)
    connection = connections.read(place.connection_file)
    place.remember_port(urlsplit(connection.url).port or DEFAULT_PORT)
    if not connection.api_key:
        say(
            "this database has API keys already, made elsewhere: set TUNESMITH_API_KEY to one of them, or make one for "
            "this machine: tunesmith keys create NAME --here"
        )
    return connection


def _launch(place: Home, lock: int, plan: str, env: Mapping[str, str], say: Say) -> None:
    """Start the supervisor and wait until it says that everything is ready."""
    with place.log("supervisor").open("ab") as log:
        launcher = subprocess.Popen(
            [*python("tunesmith.local_stack.supervisor"), str(lock), str(place.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=env,
            cwd=CHECKOUT,
            pass_fds=(lock,),
            start_new_session=True,
            text=True,
        )
    with launcher:
        assert launcher.stdin is not None
        assert launcher.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                launcher.stdin.write(plan)
                launcher.stdin.close()
            _wait_until_ready(launcher.stdout, place, say)
        except BaseException:
            # On Ctrl-C too: half a stack must not stay.
            _abort(launcher.stdout, place)
            raise


def _wait_until_ready(events: IO[str], place: Home, say: Say) -> None:
    """Read the supervisor's events (JSON lines) until it reports that the stack is ready.

    Raises:
        StackError: it reports a failure, or ends.
    """
    for line in events:
        event = json.loads(line)
        if event["event"] == "ready":
            return
        if event["event"] == "failed":
            raise StackError(f"the stack did not start: {event['message']}")
        if event["event"] == "child_ready":
            say(f"{event['name']} is ready")
        if event["event"] == "waiting":
            doing = f": {event['doing']}" if event["doing"] else ""
            say(f"still waiting for {event['name']} after {event['seconds']} s{doing}")
    raise StackError(f"the supervisor ended before the stack was ready; see {place.log('supervisor')}")


def _abort(events: IO[str], place: Home) -> None:
    """Stop a supervisor and wait for its end, which closes the pipe."""
    if place.supervisor_pid() is None:
        # It has not recorded its id yet; it writes its first line right after that.
        events.readline()
    supervisor = place.supervisor_pid()
    if supervisor is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(supervisor, signal.SIGTERM)
    events.read()


def _run_step(place: Home, name: str, command: tuple[str, ...], env: Mapping[str, str]) -> str:
    """Run a command to its end, its stderr into its log. Returns its stdout."""
    path = place.log(name)
    start = path.stat().st_size if path.exists() else 0
    with path.open("ab") as log:
        done = subprocess.run(command, env=env, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=log, text=True)
    if done.returncode != 0:
        raise StackError(f"{name} failed:\n{log_tail(path, start)}")
    return done.stdout


def _known_pids(place: Home) -> dict[str, int]:
    try:
        return connections.read(place.connection_file).pids
    except NoConnection:
        return {}


def _left_of(pids: Mapping[str, int]) -> dict[str, int]:
    """What of these groups is still there: what was killed a moment ago gives its memory back first."""
    deadline = time.monotonic() + GONE_SECONDS
    while left := {name: pid for name, pid in pids.items() if _group_exists(pid)}:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return left


def _group_exists(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except (ProcessLookupError, PermissionError):
        # A group of that number which is not ours belongs to another user by now.
        return False
    return True
