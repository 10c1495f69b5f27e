"""How torch's threads wait for one another at the end of a parallel region; to be set before torch is imported."""

from collections.abc import MutableMapping

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
"""A thread spins for a tenth of a millisecond and then sleeps (libgomp's reference). Sleeping at once makes a decode
step half as long again, for waking takes longer than most regions; spinning for ever takes cores that others want."""


def spin_briefly(environ: MutableMapping[str, str]) -> None:
    """Set what the environment does not say otherwise."""
    for name, value in WAITING.items():
        environ.setdefault(name, value)
