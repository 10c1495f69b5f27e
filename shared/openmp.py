"""How torch's threads wait for one another at the end of a parallel region. Set it before torch is imported."""

from collections.abc import MutableMapping

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
"""A thread spins for a tenth of a millisecond and then sleeps (see libgomp's manual). With sleep at once a decode step
takes 50 % longer, because waking a thread takes longer than most parallel regions last; endless spinning takes cores
from other processes."""


def spin_briefly(environ: MutableMapping[str, str]) -> None:
    """Set each variable that the environment does not set already."""
    for name, value in WAITING.items():
        environ.setdefault(name, value)
