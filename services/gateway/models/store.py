"""What a model's name stands for: a base of the catalogue, or an adapter or checkpoint in SQL. Knows no HTTP."""

from dataclasses import dataclass

from sqlalchemy import Connection

from shared.adapters.names import may_be_adapter_name
from shared.adapters.store import Adapter, AdapterStore
from shared.bases.catalogue import Base, Catalogue
from shared.errors import InvalidRequest, NotFound
from shared.jobs.rows import job_continuing


@dataclass(frozen=True, slots=True)
class Target:
    """What answers a request: a base's catalogue id, and an adapter's id unless the base answers without one."""

    base: str
    adapter: str | None = None


class ModelStore:
    """All models a project can name."""

    def __init__(self, catalogue: Catalogue, adapters: AdapterStore) -> None:
        self._catalogue = catalogue
        self._adapters = adapters

    @property
    def bases(self) -> tuple[Base, ...]:
        return self._catalogue.bases

    def base(self, name: str) -> Base | None:
        """The base of an id or alias, if it is one."""
        try:
            return self._catalogue.get(name)
        except NotFound:
            return None

    def adapters(self, tx: Connection, project: str) -> list[Adapter]:
        """Published adapters and checkpoints, newest first."""
        return self._adapters.list(tx, project)

    def adapter(self, tx: Connection, project: str, name: str) -> Adapter:
        """A published adapter by its name or its id.

        Raises:
            NotFound: there is none in this project.
        """
        if not may_be_adapter_name(name):
            raise NotFound("no model of that name", code="model_not_found")
        return self._adapters.get(tx, project, name)

    def resolve(self, tx: Connection, project: str, name: str) -> Target:
        """What a client's name stands for.

        Raises:
            NotFound: nothing; never the base instead.
        """
        base = self.base(name)
        if base is not None:
            return Target(base.id)
        adapter = self.adapter(tx, project, name)
        return Target(adapter.base, adapter.id)

    def delete(self, tx: Connection, project: str, name: str) -> Adapter:
        """Make an adapter unknown from now on; its folder is the caller's to remove.

        Raises:
            NotFound: there is none in this project.
            InvalidRequest: it is a base, or a job that has not ended starts from it.
        """
        if self.base(name) is not None:
            raise InvalidRequest("base models cannot be deleted", param="model", code="base_model")
        # Locked, so that no job can begin to use it between the question and the deletion.
        adapter = self._adapters.get(tx, project, name, lock=True)
        user = job_continuing(tx, adapter.id)
        if user is not None:
            message = f"{adapter.name} is in use by {user}, which continues it and has not ended"
            raise InvalidRequest(message, param="model", code="model_in_use")
        return self._adapters.delete(tx, project, name)
