"""Responses kept for a time, per project: what a later request names by `previous_response_id` or by an item's id.

Statements stand here; transactions are the caller's.
"""

import json
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, delete, func, insert, or_, select

from shared.errors import NotFound
from shared.storage.tables import kept_items

# Of one response; a larger one is not kept.
MAX_BYTES = 1 << 20
# Of all; beyond it the oldest go first.
MAX_BYTES_TOGETHER = 1 << 30
_ROW_BYTES = 256


class ResponseStore:
    """What was answered.

    Args:
        keep_seconds: how long.
        bytes_together: of all that is kept.
        now: seconds since the epoch.
    """

    def __init__(
        self,
        keep_seconds: int,
        now: Callable[[], float] = time.time,
        *,
        bytes_together: int = MAX_BYTES_TOGETHER,
    ) -> None:
        self._keep_seconds, self._now, self._bytes_together = keep_seconds, now, bytes_together

    def find(self, tx: Connection, project: str, item: str, param: str) -> dict[str, Any]:
        """What was kept under an id.

        Raises:
            NotFound: nothing is, or it is another project's, or it was kept long enough; `param` is at fault.
        """
        c = kept_items.c
        query = select(c.body).where(c.id == item, c.project == project, c.created_at >= self._oldest())
        body = tx.execute(query).scalar_one_or_none()
        if body is None:
            raise NotFound(f"nothing is kept under the id {item}", param=param)
        found: dict[str, Any] = json.loads(body)
        return found

    def keep(self, tx: Connection, project: str, response: str, items: dict[str, dict[str, Any]]) -> None:
        """Keep a response and the items that belong to it, by their ids."""
        now = int(self._now())
        written = {item: json.dumps(body) for item, body in items.items()}
        common = {"project": project, "response": response, "created_at": now}
        rows = [{"id": item, "body": body, "bytes": len(body) + _ROW_BYTES, **common} for item, body in written.items()]
        tx.execute(insert(kept_items), rows)

    def delete(self, tx: Connection, project: str, response: str) -> None:
        """Forget a response and its items.

        Raises:
            NotFound: there is no such response.
        """
        self.find(tx, project, response, "response_id")
        tx.execute(delete(kept_items).where(kept_items.c.project == project, kept_items.c.response == response))

    def forget(self, tx: Connection) -> int:
        """Drop what has been kept long enough, or is too much. Returns how many rows went."""
        c = kept_items.c
        newer = func.sum(c.bytes).over(order_by=(c.created_at.desc(), c.id)).label("newer")
        sized = select(c.id, newer).subquery()
        excess = select(sized.c.id).where(sized.c.newer > self._bytes_together)
        old = or_(c.created_at < self._oldest(), c.id.in_(excess))
        return tx.execute(delete(kept_items).where(old)).rowcount

    def _oldest(self) -> int:
        return int(self._now()) - self._keep_seconds


def fits(items: dict[str, dict[str, Any]]) -> bool:
    """Whether a response is small enough to be kept."""
    return sum(len(json.dumps(body)) for body in items.values()) <= MAX_BYTES
