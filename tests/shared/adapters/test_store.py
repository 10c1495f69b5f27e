import pytest
from sqlalchemy import select

from shared.adapters.state import AdapterState
from shared.adapters.store import AdapterStore
from shared.errors import NotFound
from shared.jobs.spec import JobSpec
from shared.storage.database import Database
from shared.storage.tables import adapters
from tests.jobs import Jobs


@pytest.fixture
def job(store: Jobs, spec: JobSpec) -> str:
    return store.create("default", spec).id


def reserved(database: Database, job: str, *, token: int = 1) -> str:
    with database.write() as tx:
        return AdapterStore().reserve(tx, project="default", job=job, lease_token=token, base="tiny")


def state(database: Database, adapter: str) -> str | None:
    with database.read() as tx:
        return tx.execute(select(adapters.c.state).where(adapters.c.id == adapter)).scalar()


def test_reserved_published_deleted(database: Database, job: str) -> None:
    store, adapter = AdapterStore(), reserved(database, job)
    with database.write() as tx:
        with pytest.raises(NotFound):
            store.get(tx, "default", adapter)
        assert store.publish(tx, adapter, lease_token=1, name="ft:tiny:default::1", step=5)
        (found,) = store.list(tx, "default")
        assert (found.id, found.base, found.job, found.step) == (adapter, "tiny", job, 5)
        assert store.get(tx, "default", "ft:tiny:default::1") == store.get(tx, "default", adapter) == found
        store.delete(tx, "default", found.name)
        assert store.list(tx, "default") == []
        with pytest.raises(NotFound):
            store.delete(tx, "default", found.name)
    assert state(database, adapter) == AdapterState.DELETED


def test_another_project_sees_nothing(database: Database, job: str) -> None:
    store, adapter = AdapterStore(), reserved(database, job)
    with database.write() as tx:
        store.publish(tx, adapter, lease_token=1, name="ft:x", step=5)
        assert store.list(tx, "other") == []
        for change in (store.get, store.delete):
            with pytest.raises(NotFound):
                change(tx, "other", "ft:x")


def test_only_the_lease_that_reserved_it_publishes_and_once(database: Database, job: str) -> None:
    store, adapter = AdapterStore(), reserved(database, job, token=1)
    with database.write() as tx:
        assert not store.publish(tx, adapter, lease_token=2, name="ft:x", step=5)
        assert store.publish(tx, adapter, lease_token=1, name="ft:x", step=5)
        assert not store.publish(tx, adapter, lease_token=1, name="ft:y", step=5)


def test_only_what_is_reserved_is_discarded(database: Database, job: str) -> None:
    store, one, other = AdapterStore(), reserved(database, job), reserved(database, job)
    with database.write() as tx:
        store.publish(tx, one, lease_token=1, name="ft:x", step=5)
        store.discard(tx, one)
        store.discard(tx, other)
    assert (state(database, one), state(database, other)) == (AdapterState.PUBLISHED, None)
