"""Memory that the C library keeps for later, given back to the system."""

import ctypes


def give_back_free_memory() -> None:
    """Return what has been freed; costs milliseconds, so between jobs only. A no-op without glibc.

    What loading and training leave behind is a third of a GB on a model of 135 million parameters, and the next job's
    peak would begin on top of it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
