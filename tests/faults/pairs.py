"""Two operations on one job at once, by two processes' parts: one stands at its n-th step while the other runs.

The oracle is the order: what both answer and what is there afterwards must be what one of the two orders gives. On
PostgreSQL the first stands before each statement, before its COMMIT and after it; if the second then waits for its
locks, the first goes on. On SQLite, where writers follow one another, it stands between transactions.
"""

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import Connection, Table, event, insert, select
from structlog.testing import capture_logs

from services.gateway.background.garbage_collector import GarbageCollector
from shared.bases.catalogue import Catalogue
from shared.errors import InvalidRequest, LeaseLost, NotFound
from shared.jobs.fencing import Lease
from shared.jobs.heartbeats import Heartbeat, Heartbeats
from shared.jobs.publication import final_name
from shared.jobs.rows import NewEvent
from shared.jobs.spec import State
from shared.storage.artifacts import ADAPTER_WEIGHTS
from shared.storage.database import Database, migrate
from shared.storage.installation_id import adopt
from shared.storage.manifests import Manifest
from shared.storage.tables import metadata
from tests.faults.scenarios import BODY
from tests.faults.world import Parts
from tests.jobs import REPORT
from tests.tiny import prepared_tiny

STATES = (State.QUEUED, State.RUNNING, State.PAUSED)
# Nothing here takes longer, unless it waits for something that is not the database's.
WAIT_SECONDS = 2.0
HANGS_SECONDS = 20.0
REFUSALS = (InvalidRequest, NotFound, LeaseLost)
UNEXPECTED = "unexpected"


@dataclass(frozen=True, slots=True)
class Given:
    """What is there at the beginning.

    Attributes:
        lease: the job's; over, unless the job is running.
        adapter: reserved by that lease, and staged.
        model: an earlier job's.
        seen: what a reaper has seen of leases long ago.
    """

    job: str
    file: str
    other_file: str
    lease: Lease
    adapter: str
    model: str
    seen: list[Heartbeat]


Operation = Callable[[Parts, Given], object]
Rows = dict[Table, list[dict[str, Any]]]


def _create(parts: Parts, given: Given) -> str:
    return parts.create("pair", _continuing(given) | {"training_file": given.file, "validation_file": given.other_file})


def _create_swapped(parts: Parts, given: Given) -> str:
    files = {"training_file": given.other_file, "validation_file": given.file}
    return parts.create("swapped", _continuing(given) | files)


def _create_on_several(parts: Parts, given: Given) -> str:
    return parts.create("several", BODY | {"training_files": [given.other_file, given.file]})


def _continuing(given: Given) -> dict[str, Any]:
    """A body that continues the model; LoRA's shape is then the model's."""
    return {name: value for name, value in BODY.items() if name != "lora"} | {"model": given.model}


def _claim(parts: Parts, given: Given) -> str | None:
    lease = parts.leases.claim("w2")
    return None if lease is None else lease.job.id


def _expire(parts: Parts, given: Given) -> bool:
    return any(Heartbeats(parts.database).expire(beat) for beat in given.seen)


def _collect(parts: Parts, given: Given) -> None:
    GarbageCollector(parts.database, parts.store, now=lambda: time.time() + 7200).collect()


def _request(action: str) -> Operation:
    return lambda parts, given: parts.request(action, given.job)


OPERATIONS: dict[str, Operation] = {
    "create": _create,
    "create, files swapped": _create_swapped,
    "create on several files": _create_on_several,
    "claim": _claim,
    "renew": lambda parts, given: parts.leases.renew(given.lease),
    "record": lambda parts, given: parts.leases.record(given.lease, [NewEvent("noted")], number=7),
    "cancel": _request("cancel"),
    "pause": _request("pause"),
    "resume": _request("resume"),
    "succeed": lambda parts, given: parts.leases.succeed(given.lease, given.adapter, REPORT),
    "release": lambda parts, given: parts.leases.release(given.lease, "stopping"),
    "expire": _expire,
    "delete file": lambda parts, given: parts.delete_file(given.file),
    "delete other file": lambda parts, given: parts.delete_file(given.other_file),
    "delete model": lambda parts, given: parts.delete_model(given.model),
    "collect": _collect,
}


@dataclass(frozen=True, slots=True)
class Seen:
    """What two operations came to, and what is there afterwards, without what differs between runs."""

    first: str
    second: str
    after: str


@dataclass
class Turn:
    """Where one thread stands: before its step number `at`."""

    at: int | None
    count: int = 0
    standing: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)
    thread: int = 0

    def step(self) -> None:
        if threading.get_ident() != self.thread:
            return
        number, self.count = self.count, self.count + 1
        if number == self.at:
            self.standing.set()
            self.go.wait(HANGS_SECONDS)


class Pairs:
    """Runs pairs of operations on one database.

    Args:
        url: of an empty database.
        folder: an empty one.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._root, self._prepared = url, folder / "at", folder
        store, base, _ = prepared_tiny(folder / "new")
        migrate(url)
        self._catalogue = Catalogue((base,))
        self._database = Database(url)
        with self._database.read() as tx:
            adopt(tx, store)
        self._empty = self._rows()
        self._snapshots: dict[State, Rows] = {}
        self._given = {state: self._prepare(state) for state in STATES}
        self._orders: dict[tuple[State, str, str | None], Seen] = {}
        self._first, self._second = self._parts(), self._parts()
        self._turn = Turn(None)
        self._count_steps(self._first.database)
        self._watch = None if self._database.is_sqlite else psycopg.connect(url, autocommit=True)

    def close(self) -> None:
        for database in (self._database, self._first.database, self._second.database):
            database.close()
        if self._watch is not None:
            self._watch.close()

    def interleavings(self, state: State, first: str, second: str) -> Iterator[tuple[int, str | None]]:
        """(step at which the first stood, what was wrong or None) for each of its steps."""
        allowed = [*self._allowed(state, first, second), *map(_swapped, self._allowed(state, second, first))]
        at = 0
        while (seen := self._interleaved(state, first, second, at)) is not None:
            yield at, (None if seen in allowed else _difference(seen, allowed))
            at += 1

    def _allowed(self, state: State, first: str, second: str) -> Iterator[Seen]:
        yield self.in_order(state, first, second)
        if second == "claim":
            # It passes over what another has locked, and comes again.
            alone = self.in_order(state, first, None)
            yield Seen(alone.first, str(None), alone.after)

    def in_order(self, state: State, first: str, second: str | None) -> Seen:
        """One after the other, or the first alone."""
        if (state, first, second) not in self._orders:
            given = self._begin(state)
            with capture_logs():
                outcomes = [_outcome(OPERATIONS[name], self._first, given) if name else "" for name in (first, second)]
            # What is no answer in order is none beside another either.
            assert not any(outcome.startswith(UNEXPECTED) for outcome in outcomes), outcomes
            self._orders[state, first, second] = self._seen(given, *outcomes)
        return self._orders[state, first, second]

    def _interleaved(self, state: State, first: str, second: str, at: int) -> Seen | None:
        """None if the first has fewer steps."""
        given = self._begin(state)
        outcomes = ["", ""]

        def run(place: int, name: str, parts: Parts) -> None:
            if place == 0:
                self._turn.thread = threading.get_ident()
            outcomes[place] = _outcome(OPERATIONS[name], parts, given)

        self._turn = turn = Turn(at)
        threads = [
            threading.Thread(target=partial(run, place, name, parts))
            for place, (name, parts) in enumerate([(first, self._first), (second, self._second)])
        ]
        with capture_logs():
            threads[0].start()
            while threads[0].is_alive() and not turn.standing.is_set():
                turn.standing.wait(0.0005)
            if not turn.standing.is_set():
                return None
            threads[1].start()
            deadline = time.monotonic() + WAIT_SECONDS
            while threads[1].is_alive() and not self._waits() and time.monotonic() < deadline:
                threads[1].join(0.001)
            turn.go.set()
            for thread in threads:
                thread.join(HANGS_SECONDS)
        if any(thread.is_alive() for thread in threads):
            return Seen("hangs", "hangs", "")
        return self._seen(given, *outcomes)

    def _waits(self) -> bool:
        """Whether somebody waits for another's lock."""
        if self._watch is None:
            return False
        query = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        return self._watch.execute(query).fetchone() is not None

    def _count_steps(self, database: Database) -> None:
        write, read = database.write, database.read

        @contextmanager
        def counted(begin: Callable[[], Any], *, writes: bool) -> Iterator[Connection]:
            self._turn.step()
            with begin() as tx:
                yield tx
                if writes and not database.is_sqlite:
                    self._turn.step()
            if writes:
                self._turn.step()

        database.write = partial(counted, write, writes=True)  # type: ignore[method-assign]
        database.read = partial(counted, read, writes=False)  # type: ignore[method-assign]
        if not database.is_sqlite:
            event.listen(database._writer, "before_cursor_execute", lambda *_: self._turn.step())

    # ------------------------------------------------------------------ what is there

    def _parts(self) -> Parts:
        return Parts(self._root, self._catalogue, self._url)

    def _prepare(self, state: State) -> Given:
        """A job in this state, held or once held by a worker, after an earlier one with a model."""
        self._restore(self._empty, self._prepared / "new")
        parts = self._parts()
        file, other_file = parts.upload("upload"), parts.upload("another upload")
        model = self._earlier_model(parts, file)
        job = parts.create("create", BODY | {"training_file": file})
        lease = parts.leases.claim("w1")
        assert lease is not None
        assert lease.job.id == job
        parts.leases.renew(lease)
        _, adapter = self._staged(parts, lease)
        if state is State.PAUSED:
            parts.request("pause", job)
        if state is not State.RUNNING:
            assert parts.leases.release(lease, "stopped") is state
        seen = Heartbeats(parts.database).read()
        parts.close()
        shutil.copytree(self._root, self._prepared / state.value)
        self._snapshots[state] = self._rows()
        return Given(job, file, other_file, lease, adapter, model, seen)

    def _earlier_model(self, parts: Parts, file: str) -> str:
        parts.create("earlier", BODY | {"training_file": file})
        lease = parts.leases.claim("w0")
        assert lease is not None
        parts.leases.renew(lease)
        name, adapter = self._staged(parts, lease)
        parts.leases.succeed(lease, adapter, REPORT)
        return name

    @staticmethod
    def _staged(parts: Parts, lease: Lease) -> tuple[str, str]:
        """(name that it will have, id) of a reserved adapter with a folder."""
        adapter, spec = parts.leases.reserve_adapter(lease), lease.job.spec
        manifest = Manifest(
            kind="adapter", id=adapter, base=spec.base, base_revision=spec.base_revision, base_sha256="0" * 64, files={}
        )
        with parts.store.staged() as folder:
            (folder / ADAPTER_WEIGHTS).write_bytes(b"weights")
            parts.store.publish(folder, parts.store.adapter(adapter), manifest)
        return final_name(lease.job), adapter

    def _begin(self, state: State) -> Given:
        self._turn = Turn(None)
        self._restore(self._snapshots[state], self._prepared / state.value)
        return self._given[state]

    def _rows(self) -> Rows:
        with self._database.read() as tx:
            return {
                table: [dict(row._mapping) for row in tx.execute(select(table))] for table in metadata.sorted_tables
            }

    def _restore(self, rows: Rows, folder: Path) -> None:
        with self._database.write() as tx:
            for table in reversed(metadata.sorted_tables):
                tx.execute(table.delete())
            for table, found in rows.items():
                if found:
                    tx.execute(insert(table), found)
        shutil.rmtree(self._root, ignore_errors=True)
        shutil.copytree(folder, self._root)

    def _seen(self, given: Given, first: str, second: str) -> Seen:
        lines = [
            f"{table.name} {json.dumps(_shown(table, row), sort_keys=True, default=str)}"
            for table, found in self._rows().items()
            for row in found
        ]
        for kind in ("files", "adapters", "jobs", "staging", "trash", "cache"):
            folder = self._root / "artifacts" / kind
            lines += [f"folder {kind}/{path.name}" for path in folder.iterdir()] if folder.is_dir() else []
        return Seen(
            _plain(first, given), _plain(second, given), "\n".join(sorted(_plain(line, given) for line in lines))
        )


# What differs between runs, or says when.
UNLIKE = frozenset({"created_ns", "created_at", "started_at", "finished_at", "fingerprint"})
NEW_ID = re.compile(r"(file|ftjob|adapter)-[0-9a-f]{24}|(?<=:)[0-9a-f]{12}(?=\b)")


def _shown(table: Table, row: dict[str, Any]) -> dict[str, Any]:
    shown = {column: value for column, value in row.items() if column not in UNLIKE}
    if table.name == "idempotency_keys":
        shown |= {"id": "", "body": json.loads(row["body"])["id"]}
    return shown


def _plain(text: str, given: Given) -> str:
    for name in ("job", "file", "other_file", "adapter"):
        text = text.replace(getattr(given, name), name.upper())
    return NEW_ID.sub("*", text)


def _outcome(operation: Operation, parts: Parts, given: Given) -> str:
    try:
        return str(operation(parts, given))
    except REFUSALS as error:
        return f"{type(error).__name__} {error.code}"
    except Exception as error:
        return f"{UNEXPECTED}: {type(error).__name__}: {error}"


def _swapped(seen: Seen) -> Seen:
    return Seen(seen.second, seen.first, seen.after)


def _difference(seen: Seen, allowed: list[Seen]) -> str:
    """The outcomes, and the lines of what is there that neither order gives."""
    lines = [f"{seen.first} | {seen.second}, allowed: " + "; ".join(f"{one.first} | {one.second}" for one in allowed)]
    for one in allowed:
        lines.append(f"unlike {one.first} | {one.second}:")
        here, there = set(seen.after.splitlines()), set(one.after.splitlines())
        lines += [f"  + {line}" for line in sorted(here - there)] + [f"  - {line}" for line in sorted(there - here)]
    return "\n".join(lines)
