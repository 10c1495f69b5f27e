"""Who may read what this process writes: datasets, weights and the database are nobody else's on the machine."""

import os


def keep_files_private(umask: str) -> None:
    """Set this process's umask; children inherit it.

    Args:
        umask: octal, as `TUNESMITH_UMASK` has it; 077 keeps files from everybody but their owner.
    """
    os.umask(int(umask, 8))
