"""memory that libraries keep for later: given back to the system, or not kept"""

import ctypes
import os

# More than the shapes of one step's products, forwards and backwards.
KERNELS = 64


def give_back_free_memory() -> None:
    """Return what has been freed; costs milliseconds, so between jobs only. A no-op without glibc.

    What loading and training leave behind is a third of a GB on a model of 135 million parameters, and the next job's
    peak would begin on top of it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_few_kernels() -> None:
    """Let oneDNN remember the kernels of the last step only; to be called before its first product.

    It would keep those of 1,024 shapes. Every step has a number of tokens of its own, so they are hardly ever used
    again, and after 35 steps they took half a GB. What the environment says goes before.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS))
