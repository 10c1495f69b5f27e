"""One claimed job. A test's file says what its `leases` do."""

import pytest

from shared.jobs.fencing import Lease
from shared.jobs.leases import Leases
from shared.jobs.spec import JobSpec
from shared.storage.database import Database
from tests.jobs import Jobs


@pytest.fixture
def store(database: Database) -> Jobs:
    return Jobs(database)


@pytest.fixture
def lease(store: Jobs, leases: Leases) -> Lease:
    store.create("default", JobSpec(base="tiny", base_revision="r", training_file="f", training_sha256="0" * 64))
    lease = leases.claim("w")
    assert lease is not None
    return lease
