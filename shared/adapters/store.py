"""Adapters in SQL: reserved by a worker, published under a name, deleted by their owner.

Everything happens in the caller's transaction. Knows no job and no file.
"""

import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, delete, insert, or_, select, update

from shared.adapters.names import is_checkpoint_name
from shared.adapters.state import AdapterState
from shared.clock import Nanoseconds, seconds_of
from shared.errors import NotFound
from shared.storage.artifacts import new_id
from shared.storage.tables import adapters


@dataclass(frozen=True, slots=True)
class Adapter:
    """A published adapter: a job's final one, or a checkpoint's."""

    id: str
    name: str
    base: str
    job: str
    step: int | None
    created_ns: int

    @property
    def is_checkpoint(self) -> bool:
        return is_checkpoint_name(self.name)

    @property
    def created_at(self) -> int:
        return seconds_of(self.created_ns)


class AdapterStore:
    """The adapters of an installation, and the moves between their states."""

    def __init__(self, now: Nanoseconds = time.time_ns) -> None:
        self._now = now

    def reserve(self, tx: Connection, *, project: str, job: str, lease_token: int, base: str) -> str:
        """A fresh id, written down before anything is staged under it: the garbage collector can tell its owner."""
        adapter_id = new_id("adapter")
        row = {
            "id": adapter_id,
            "project": project,
            "job": job,
            "lease_token": lease_token,
            "state": AdapterState.RESERVED,
            "base": base,
            "created_ns": self._now(),
        }
        tx.execute(insert(adapters).values(row))
        return adapter_id

    def publish(self, tx: Connection, adapter_id: str, *, lease_token: int, name: str, step: int) -> bool:
        """Make an adapter servable under `name`. False if this lease has not reserved it."""
        mine = (*_reserved(adapter_id), adapters.c.lease_token == lease_token)
        values = {"state": AdapterState.PUBLISHED, "name": name, "step": step, "created_ns": self._now()}
        return tx.execute(update(adapters).where(*mine).values(values)).rowcount == 1

    def discard(self, tx: Connection, adapter_id: str) -> None:
        """Forget an adapter that was reserved and is not wanted; its folder becomes garbage."""
        tx.execute(delete(adapters).where(*_reserved(adapter_id)))

    def list(self, tx: Connection, project: str) -> list[Adapter]:
        """Published adapters and checkpoints, newest first."""
        query = _published(project).order_by(adapters.c.created_ns.desc(), adapters.c.id.desc())
        return [Adapter(*row) for row in tx.execute(query)]

    def get(self, tx: Connection, project: str, name: str, *, lock: bool = False) -> Adapter:
        """A published adapter by its name (`shared.adapters.names`) or its id.

        Args:
            lock: nobody can delete it until the transaction ends.

        Raises:
            NotFound: there is none in this project.
        """
        query = _published(project).where(or_(adapters.c.name == name, adapters.c.id == name))
        row = tx.execute(query.with_for_update() if lock else query).one_or_none()
        if row is None:
            raise NotFound(f"no model {name[:200]!r}", code="model_not_found")
        return Adapter(*row)

    def delete(self, tx: Connection, project: str, name: str) -> Adapter:
        """Make an adapter unknown from now on; its folder is the caller's to remove.

        Raises:
            NotFound: there is none in this project.
        """
        adapter = self.get(tx, project, name)
        tx.execute(update(adapters).where(adapters.c.id == adapter.id).values(state=AdapterState.DELETED))
        return adapter

    def withdraw(self, tx: Connection, adapter_id: str) -> None:
        """Make a checkpoint's adapter unknown from now on, and its name free: a step may be trained again.

        Its folder is the caller's to remove.
        """
        values = {"state": AdapterState.DELETED, "name": None}
        tx.execute(update(adapters).where(adapters.c.id == adapter_id).values(values))

    def lock(self, tx: Connection, adapter_id: str) -> None:
        """Nobody can begin to use an adapter, or delete it, until the transaction ends."""
        tx.execute(select(adapters.c.id).where(adapters.c.id == adapter_id).with_for_update())


def _reserved(adapter_id: str) -> tuple[ColumnElement[bool], ...]:
    return adapters.c.id == adapter_id, adapters.c.state == AdapterState.RESERVED


def _published(project: str) -> Select[Any]:
    c = adapters.c
    query = select(c.id, c.name, c.base, c.job, c.step, c.created_ns)
    return query.where(c.project == project, c.state == AdapterState.PUBLISHED)
