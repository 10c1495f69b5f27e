"""Keyset paging: a page begins after the last row of the page before, so that new rows never shift it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Connection, Select, tuple_

from shared.errors import InvalidRequest

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    items: list[T]
    has_more: bool

    def map(self, make: Callable[[T], U]) -> "Page[U]":
        """The same page with `make` applied to each item."""
        return Page([make(item) for item in self.items], self.has_more)


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a page begins: after the row that a client names.

    Attributes:
        name: what the client wrote, for the message if there is no such row.
        row: selects the sort keys of that row, in the order of the keys; no row if the client may not see it.
    """

    name: str
    row: Select[Any]


def keyset_page(
    tx: Connection,
    query: Select[Any],
    keys: Sequence[ColumnElement[Any]],
    *,
    limit: int,
    after: Cursor | None = None,
    descending: bool = True,
) -> Page[Any]:
    """At most `limit` rows of `query` in the order of `keys` (together unique), after (not including) the cursor's.

    The items are SQLAlchemy's rows. One statement, unless the page is empty.

    Raises:
        InvalidRequest: there is no row to continue after.
    """
    if after is not None:
        # An unknown cursor compares with NULL: no row follows it.
        position, here = after.row.scalar_subquery(), tuple_(*keys)
        query = query.where(here < position if descending else here > position)
    order = [key.desc() if descending else key.asc() for key in keys]
    found = tx.execute(query.order_by(*order).limit(limit + 1)).all()
    if not found and after is not None and tx.execute(after.row).first() is None:
        raise InvalidRequest(f"no item {after.name[:100]!r} to continue after", param="after")
    return Page(list(found[:limit]), len(found) > limit)
