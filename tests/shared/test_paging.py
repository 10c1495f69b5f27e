from collections.abc import Sequence

import pytest
from sqlalchemy import Connection, insert, select

from shared.errors import InvalidRequest
from shared.paging import Cursor, Page, keyset_page
from shared.storage.database import Database
from shared.storage.tables import api_keys

KEYS = (api_keys.c.created_at, api_keys.c.id)


@pytest.fixture
def rows(database: Database) -> list[str]:
    """Ids by age, four of them of the same second."""
    names = [f"k{n}" for n in range(8)]
    with database.write() as tx:
        for n, name in enumerate(names):
            created = 5 if 2 <= n < 6 else n
            tx.execute(insert(api_keys).values(id=name, project="p", digest=name, created_at=created))
    return names


def page(tx: Connection, after: str | None, limit: int, *, descending: bool) -> Page[str]:
    cursor = Cursor(after, select(*KEYS).where(api_keys.c.id == after, api_keys.c.project == "p")) if after else None
    found = keyset_page(tx, select(api_keys.c.id), KEYS, limit=limit, after=cursor, descending=descending)
    return found.map(lambda row: str(row.id))


@pytest.mark.parametrize("limit", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("descending", [True, False])
def test_pages_hold_every_row_once_and_in_order(
    database: Database, rows: Sequence[str], limit: int, descending: bool
) -> None:
    seen: list[str] = []
    with database.read() as tx:
        while True:
            found = page(tx, seen[-1] if seen else None, limit, descending=descending)
            assert 1 <= len(found.items) <= limit
            seen += found.items
            if not found.has_more:
                break
    assert seen == (list(reversed(rows)) if descending else list(rows))


def test_after_the_last_row_comes_an_empty_page(database: Database, rows: Sequence[str]) -> None:
    with database.read() as tx:
        assert page(tx, rows[0], 5, descending=True) == Page([], False)


def test_an_unknown_cursor_is_refused(database: Database, rows: Sequence[str]) -> None:
    with database.read() as tx, pytest.raises(InvalidRequest) as refused:
        page(tx, "none", 5, descending=True)
    assert refused.value.param == "after"
