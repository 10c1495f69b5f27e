"""One installation on SQLite with the tiny base: what its clients ask for, its worker, and how it comes back.

The parts are the services' own, as their processes put them together; only HTTP, Celery and the clock are not here.
Clients behave as OpenAI's do: what was not answered they send again, under the key of the first sending.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy.exc import SQLAlchemyError

from services.gateway.background.garbage_collector import GarbageCollector
from services.gateway.background.notifier import Notifier
from services.gateway.bases.hub_access import HubAccess
from services.gateway.bases.metadata import BaseMetadataReader
from services.gateway.files.store import FileStore
from services.gateway.files.upload import receiving
from services.gateway.http.idempotency import Attempt, IdempotencyStore
from services.gateway.jobs.request_schema import JobRequest
from services.gateway.jobs.resolution import JobResolver
from services.gateway.jobs.sources import JobSources
from services.gateway.models.store import ModelStore
from services.gateway.routes import files as file_routes
from services.gateway.routes import jobs as job_routes
from services.trainer.model.bases import WarmBases
from services.trainer.worker import lease_session, loop, record_writer, retry
from services.trainer.worker.loop import Worker
from shared.adapters.store import AdapterStore
from shared.bases.catalogue import Catalogue
from shared.errors import InvalidRequest, NotFound, Unavailable
from shared.jobs.checkpoints import Committed
from shared.jobs.fencing import Lease
from shared.jobs.heartbeats import Heartbeats
from shared.jobs.leases import Leases
from shared.jobs.rows import Job
from shared.jobs.store import JobStore
from shared.jobs.worker_outages import WorkerOutages
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.database import Database, migrate
from shared.storage.installation_id import adopt, require_own_folder
from tests.faults.disk import Disk
from tests.faults.points import Died, Fault, Steps
from tests.tiny import prepared_tiny

PROJECT = "default"
DATA = "".join(
    json.dumps({"prompt": f"What is {n}?", "completion": f"It is {n * 7}."}) + "\n" for n in range(6)
).encode()
CONTENT_TYPE = "multipart/form-data; boundary=x"
BODY = (
    b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="d.jsonl"\r\n\r\n' + DATA + b"\r\n--x--\r\n"
)
ROUNDS = 12


class InOrder(record_writer.RecordWriter):
    """Waits for each record, so that every run of a scenario takes the same steps in the same order."""

    steps: Steps | None = None

    def put(self, *events: Any, **kwargs: Any) -> None:
        super().put(*events, **kwargs)
        with self._changed:
            while self._busy and not self._failed and self._thread.is_alive():
                self._changed.wait(0.005)
        if self.steps is not None and self.steps.dead:
            raise Died

    def _run(self) -> None:
        try:
            super()._run()
        except Died:
            return


class Renewing(lease_session.LeaseSession):
    """Renews the lease after each checkpoint, and not by the clock."""

    def commit_checkpoint(self, *, step: int, adapter_id: str, metrics: dict[str, float]) -> Sequence[str]:
        removed = super().commit_checkpoint(step=step, adapter_id=adapter_id, metrics=metrics)
        with suppress(SQLAlchemyError):
            self._requested = self._leases.renew(self._lease)
        return removed


@dataclass
class Call:
    """One request of a client.

    Attributes:
        answer: once it was acknowledged; what was refused for good is answered too.
    """

    name: str
    send: Callable[["Parts"], Any]
    answer: Any = None
    answered: bool = False
    refused: str = ""


class Parts:
    """What one process works with, made anew after every crash."""

    def __init__(self, root: Path, catalogue: Catalogue, url: str | None = None) -> None:
        self.database = Database(url or f"sqlite:///{root / 'tunesmith.db'}")
        self.store = LocalArtifactStore(root / "artifacts")
        self.files, self.jobs, self.adapters = FileStore(), JobStore(), AdapterStore()
        self.idempotency = IdempotencyStore()
        self.models = ModelStore(catalogue, self.adapters)
        self.sources = JobSources(self.files, self.jobs, self.adapters)
        metadata = BaseMetadataReader(self.store)
        self.resolver = JobResolver(catalogue, metadata)
        self.hub = HubAccess(catalogue, metadata)
        self.leases = Leases(self.database)

    def upload(self, key: str) -> str:
        with receiving(self.store, CONTENT_TYPE, 1 << 20) as upload:
            upload.feed(BODY)
            answer = file_routes._keep(
                upload,
                self.database,
                self.store,
                self.idempotency,
                self.files,
                PROJECT,
                lambda fingerprint: Attempt("key-first", "/v1/files", key, fingerprint),
            )
        return str(json.loads(bytes(answer.body))["id"])

    def create(self, key: str, body: dict[str, Any]) -> str:
        answer = job_routes.create_fine_tuning_job(
            self.database,
            self.idempotency,
            self.sources,
            self.resolver,
            self.hub,
            self.jobs,
            _Silent(),
            PROJECT,
            lambda fingerprint: Attempt("key-first", "/v1/fine_tuning/jobs", key, fingerprint),
            JobRequest.model_validate(body),
        )
        return str(json.loads(bytes(answer.body))["id"])

    def request(self, action: str, job_id: str) -> str:
        with self.database.write() as tx:
            return str(getattr(self.jobs, action)(tx, PROJECT, job_id).state)

    def delete_file(self, file_id: str) -> str:
        file_routes.delete_file(self.database, self.store, self.files, PROJECT, file_id)
        return file_id

    def delete_model(self, name: str) -> str:
        with self.database.write() as tx:
            adapter = self.models.delete(tx, PROJECT, name)
        self.store.remove(self.store.adapter(adapter.id))
        return adapter.id

    def job(self, job_id: str) -> Job:
        with self.database.read() as tx:
            return self.jobs.get(tx, PROJECT, job_id)

    def close(self) -> None:
        self.database.close()


class _Silent(Notifier):
    def __init__(self) -> None:
        pass

    def notify(self) -> None:
        pass


@dataclass
class World:
    """The installation, the requests made of it, and the fault it is to meet."""

    root: Path
    catalogue: Catalogue
    bases: WarmBases
    steps: Steps
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parts = Parts(self.root, self.catalogue)

    # ------------------------------------------------------------------ what happens

    def plan(self, name: str, send: Callable[[Parts], Any]) -> None:
        """A request that a client is going to make, after those before it."""
        self.calls.append(Call(name, send))

    def send(self, name: str) -> None:
        """Make a planned request, once, unless one before it was not answered: then it waits for that."""
        for call in self.calls:
            if call.name == name and not call.answered:
                self._send(call)
            if not call.answered:
                return

    def answer(self, name: str) -> str:
        """What a request was answered."""
        (answer,) = [call.answer for call in self.calls if call.name == name]
        return str(answer)

    def _send(self, call: Call) -> None:
        try:
            call.answer = call.send(self.parts)
            call.answered = True
        except (InvalidRequest, NotFound) as error:
            call.answered, call.refused = True, error.code or ""
        except (Unavailable, OSError, SQLAlchemyError):
            # 503, or a connection that broke: the client will ask again.
            pass

    def work(self, on_checkpoint: Callable[[int], None] | None = None) -> None:
        """A worker drains the queue."""
        worker = Worker(
            self.parts.leases,
            self.parts.store,
            self.bases,
            name="w",
            outages=WorkerOutages(self.parts.database),
            handover=lambda: False,
            renew_seconds=1e6,
            retry_seconds=0,
            check_folder=self._check_folder,
            pause=lambda _: None,
        )
        if on_checkpoint is not None:
            commit = self.parts.leases.commit_checkpoint

            def committing(lease: Lease, step: int, adapter_id: str, metrics: Mapping[str, Any]) -> Committed:
                done = commit(lease, step, adapter_id, metrics)
                on_checkpoint(step)
                return done

            self.parts.leases.commit_checkpoint = committing  # type: ignore[method-assign]
        # What breaks off a claim ends a drain; the next notification begins another.
        for _ in range(ROUNDS):
            if not worker.drain_queue() and not Heartbeats(self.parts.database).queued():
                return

    def _check_folder(self) -> None:
        with self.parts.database.read() as tx:
            require_own_folder(tx, self.parts.store)

    def collect(self, later: float = 7200.0) -> None:
        GarbageCollector(self.parts.database, self.parts.store, now=lambda: time.time() + later).collect()

    # ------------------------------------------------------------------ how it comes back

    def recover(self) -> None:
        """Everything is made anew, the clock jumps, reaper and collector run, clients ask again, work goes on."""
        if self.steps.dead:
            # Another process: nothing of the old one's memory is there.
            self.bases.discard()
            InOrder.steps = None
            if self.steps.power_cut:
                self.steps.disk.cut()
        self.parts.close()
        self.parts = Parts(self.root, self.catalogue)
        heartbeats = Heartbeats(self.parts.database)
        for beat in heartbeats.read():
            heartbeats.expire(beat)
        for call in self.calls:
            if not call.answered:
                self._send(call)
        self.collect()
        self.work()
        self.collect()
        self.collect(later=8 * 86400.0)


class Ground:
    """Where worlds are made, one after the other in one place: a folder with the tiny base, and a migrated database."""

    def __init__(self, folder: Path) -> None:
        self._template, self._root, self._removed = folder / "template", folder / "world", folder / "removed"
        store, base, _ = prepared_tiny(self._template)
        url = f"sqlite:///{self._template / 'tunesmith.db'}"
        migrate(url)
        database = Database(url)
        with database.read() as tx:
            adopt(tx, store)
        database.close()
        self._prepared: dict[Callable[[World], None], tuple[Path, list[Call]]] = {}
        self._catalogue = Catalogue((base,))
        self._bases = WarmBases(self._catalogue, LocalArtifactStore(self._root / "artifacts"), torch.device("cpu"))

    def world(self, prepare: Callable[[World], None], fault: Fault | None = None) -> World:
        """A fresh world in which `prepare` has happened, about to meet a fault."""
        if prepare not in self._prepared:
            self._prepared[prepare] = self._after(prepare)
        folder, calls = self._prepared[prepare]
        world = self._copy_of(folder)
        world.calls = [replace(call) for call in calls]
        world.steps = Steps(_disk(self._root, self._removed), fault)
        InOrder.steps = world.steps
        return world

    def _after(self, prepare: Callable[[World], None]) -> tuple[Path, list[Call]]:
        world = self._copy_of(self._template)
        prepare(world)
        world.parts.close()
        folder = self._template.with_name(f"prepared-{len(self._prepared)}")
        shutil.copytree(self._root, folder)
        return folder, world.calls

    def _copy_of(self, folder: Path) -> World:
        for place in (self._root, self._removed):
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder, self._root)
        self._removed.mkdir()
        # Each time the same steps: what was warm after the last run depends on how that ended.
        self._bases.discard()
        InOrder.steps = None
        return World(self._root, self._catalogue, self._bases, Steps(_disk(self._root, self._removed)))


def _disk(root: Path, removed: Path) -> Disk:
    return Disk(root / "artifacts", removed)


def quick(patch: pytest.MonkeyPatch) -> None:
    """Waits that say nothing here are left out; a worker's records are written in order, and folders listed in one."""
    patch.setattr(os, "listdir", lambda path=".", list_folder=os.listdir: sorted(list_folder(path)))
    patch.setattr(os, "scandir", lambda path=".", scan=os.scandir: _Entries(scan(path)))
    patch.setattr(lease_session, "RecordWriter", InOrder)
    patch.setattr(loop, "LeaseSession", Renewing)
    patch.setattr(lease_session, "END_SECONDS", 0.0)
    patch.setattr(record_writer, "PROGRESS_SECONDS", 0.0)
    patch.setattr(record_writer, "RETRY_EVERY_SECONDS", 0.0)
    patch.setattr(retry, "RETRY_EVERY_SECONDS", 0.0)


class _Entries:
    """What os.scandir returns, by name."""

    def __init__(self, found: Any) -> None:
        with found:
            self._entries = iter(sorted(found, key=lambda entry: str(entry.name)))

    def __enter__(self) -> Iterator[Any]:
        return self._entries

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return self._entries

    def __next__(self) -> Any:
        return next(self._entries)
