"""Names of models: bases of the catalogue, and adapters and checkpoints in SQL. Knows no HTTP."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, or_, select, update

from shared.bases.catalogue import Base, Catalogue
from shared.errors import InvalidRequest, NotFound
from shared.storage.database import Database
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
        return ":ckpt-step-" in self.name


@dataclass(frozen=True, slots=True)
class Target:
    """What a request is to be answered by: a base's catalogue id, and an adapter's id unless it is the base alone."""

    base: str
    adapter: str | None = None


class ModelStore:
    """All models a project can name."""

    def __init__(self, database: Database, catalogue: Catalogue) -> None:
        self._database = database
        self._catalogue = catalogue

    @property
    def bases(self) -> tuple[Base, ...]:
        return self._catalogue.bases

    def base(self, name: str) -> Base | None:
        """The base of an id or alias, if it is one."""
        try:
            return self._catalogue.get(name)
        except NotFound:
            return None

    def adapters(self, project: str) -> list[Adapter]:
        """Published adapters and checkpoints, newest first."""
        query = _published(project).order_by(adapters.c.created_ns.desc(), adapters.c.id.desc())
        with self._database.read() as connection:
            return [Adapter(*row) for row in connection.execute(query)]

    def adapter(self, project: str, name: str) -> Adapter:
        """A published adapter by its name (`ft:…`, `…:ckpt-step-N`) or its id.

        Raises:
            NotFound: there is none in this project.
        """
        query = _published(project).where(or_(adapters.c.name == name, adapters.c.id == name))
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise NotFound(f"no model {name[:200]!r}", code="model_not_found")
        return Adapter(*row)

    def resolve(self, project: str, name: str) -> Target:
        """What a client's name stands for.

        Raises:
            NotFound: nothing; never the base instead.
        """
        base = self.base(name)
        if base is not None:
            return Target(base.id)
        # What cannot be a name is not looked up (PostgreSQL refuses NUL with an error).
        if not name.isascii() or not name.isprintable() or len(name) > 255:
            raise NotFound("no model of that name", code="model_not_found")
        adapter = self.adapter(project, name)
        return Target(adapter.base, adapter.id)

    def delete(self, project: str, name: str) -> Adapter:
        """Make an adapter unknown from now on; its folder is the caller's to remove.

        Raises:
            NotFound: there is none in this project.
            InvalidRequest: it is a base.
        """
        if self.base(name) is not None:
            raise InvalidRequest("base models cannot be deleted", param="model", code="base_model")
        adapter = self.adapter(project, name)
        with self._database.write() as connection:
            mine = (adapters.c.id == adapter.id, adapters.c.state == "published")
            connection.execute(update(adapters).where(*mine).values(state="deleted"))
        return adapter


def _published(project: str) -> Select[Any]:
    c = adapters.c
    query = select(c.id, c.name, c.base, c.job, c.step, c.created_ns)
    return query.where(c.project == project, c.state == "published")
