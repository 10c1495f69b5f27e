"""Memory that the C library and oneDNN keep for later: returned to the system, or limited."""

import ctypes
import os

# More than the shapes of one step's products, forwards and backwards.
CACHED_KERNELS = 64


def release_free_memory() -> None:
    """Return what has been freed; costs milliseconds, so between jobs only. A no-op without glibc.

    What loading and training leave behind is a third of a GB on a model of 135 million parameters, and the next job's
    peak would begin on top of it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def limit_kernel_cache() -> None:
    """Let oneDNN cache the kernels of the last step only; call it before the first product.

    Its default is 1,024 shapes. Every step has a number of tokens of its own, so that they are hardly ever used again,
    and after 35 steps they took half a GB. Environment variables that are already set win.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(CACHED_KERNELS))
