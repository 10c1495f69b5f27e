"""The states of an adapter; one column, closed."""

from enum import StrEnum


class AdapterState(StrEnum):
    """Where an adapter is between a worker's first byte and its end."""

    # A worker may be writing it; it belongs to the lease it was reserved under.
    RESERVED = "reserved"
    # It can be served.
    PUBLISHED = "published"
    # Its folder goes; the id is never used again.
    DELETED = "deleted"
