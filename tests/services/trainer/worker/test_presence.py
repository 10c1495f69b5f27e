"""A training process says that it is there from its start to its end, through outages of the database."""

import threading

import pytest
from sqlalchemy.exc import OperationalError

from services.trainer.worker.presence import Presence
from shared.jobs.workers import Workers
from shared.storage.database import Database, migrate


class Counted(Workers):
    """Counts what it is told, and fails the first time."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.told = 0
        self.thrice = threading.Event()

    def seen(self, worker: str, pid: int) -> None:
        self.told += 1
        if self.told == 1:
            raise OperationalError("", {}, Exception("away"))
        super().seen(worker, pid)
        if self.told == 3:
            self.thrice.set()


@pytest.mark.timeout(60)
def test_it_is_there_until_it_stops(tmp_path: object) -> None:
    url = f"sqlite:///{tmp_path}/tunesmith.db"
    migrate(url)
    database = Database(url)
    try:
        workers = Counted(database)
        presence = Presence(workers, "w", 7, every_seconds=0.01)
        presence.start()
        assert workers.thrice.wait(60)
        assert workers.count() == 1
        presence.stop()
        assert workers.count() == 0
    finally:
        database.close()
