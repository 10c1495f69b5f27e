"""How torch's allocator holds a GPU's memory. Set it before torch is imported."""

from collections.abc import MutableMapping

ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""Every step has another number of tokens. In blocks of fixed size that leaves gaps: after 18 steps on an H200 the
allocator held 11.4 to 12.2 GB for a peak of 7.0 to 7.4 GB, with segments that grow 7.2 to 7.6 GB at the same speed."""


def grow_segments(environ: MutableMapping[str, str]) -> None:
    """Set each variable that the environment does not set already."""
    for name, value in ALLOCATOR.items():
        environ.setdefault(name, value)
