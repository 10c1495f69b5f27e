"""What tests of several services share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.storage.database import Database, migrate


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """A migrated SQLite database of its own."""
    url = f"sqlite:///{tmp_path / 'tunesmith.db'}"
    migrate(url)
    database = Database(url)
    yield database
    database.close()
