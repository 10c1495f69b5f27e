"""Logs of a stack on one machine, kept from growing without end. Their writers append, and need not know."""

import logging
import os
import shutil
from pathlib import Path

MOST_BYTES = 64 << 20


def rotate(logs: Path, most_bytes: int = MOST_BYTES) -> list[Path]:
    """Move what is in each log of a folder beyond a size to `<name>.log.1`, in the place of what was there.

    What is written between the copy and the cut is lost.

    Returns:
        The logs that begin anew.
    """
    rotated = []
    for log in sorted(logs.glob("*.log")):
        if log.stat().st_size <= most_bytes:
            continue
        try:
            shutil.copyfile(log, log.with_suffix(".log.1"))
        except OSError as error:
            # A full disk is what this is to prevent: the log is cut all the same.
            log.with_suffix(".log.1").unlink(missing_ok=True)
            logging.error("%s could not be kept: %s", log, error)
        os.truncate(log, 0)
        rotated.append(log)
    return rotated
