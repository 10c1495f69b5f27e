"""Rows held out for validation if a job has no validation file: chosen by content, so that no copy is trained on."""

import hashlib
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from services.trainer.contract import Check
from services.trainer.data.dataset import ROWS_BETWEEN_CHECKS, Data, Rows
from shared.errors import JobFailed
from shared.training.plan import held_out_rows


def hold_out(rows: Rows, share: float, seed: int, check: Check) -> Data:
    """Split rows into training and validation; a pure function of the rows, the share and the seed.

    Args:
        share: of the rows, between 0 and 1; equal rows go together, so it may come out a little larger.

    Raises:
        JobFailed: nothing would be left to train on.
        StopRequested: see `Check`.
    """
    order = _content_order(rows, seed, check)
    held_out_count = held_out_rows(len(rows), share)
    held_out = order <= np.sort(order)[held_out_count - 1]
    if held_out.all():
        raise JobFailed(
            f"validation_split {share:g} of {len(rows)} rows leaves none to train on; add rows, or leave it out",
            code="invalid_training_file",
        )
    return Data(_select(rows, ~held_out, f"{share}-{seed}-training"), _select(rows, held_out, f"{share}-{seed}-held"))


def _content_order(rows: Rows, seed: int, check: Check) -> NDArray[np.uint64]:
    order = np.empty(len(rows), np.uint64)
    for row in range(len(rows)):
        if row % ROWS_BETWEEN_CHECKS == 0:
            check()
        ids, _ = rows[row]
        digest = hashlib.sha256(seed.to_bytes(8, "little") + ids.tobytes()).digest()
        order[row] = int.from_bytes(digest[:8], "little")
    return order


def _select(rows: Rows, chosen: NDArray[np.bool_], name: str) -> Rows:
    (indices,) = np.nonzero(chosen)
    key = hashlib.sha256(f"{rows.key}-{name}".encode()).hexdigest()
    return replace(
        rows,
        key=key,
        dataset=rows.dataset.select(indices),
        lengths=rows.lengths[chosen],
        supervised=rows.supervised[chosen],
    )
