"""Loss on held-out rows, computed with the training forward and no dropout."""

from typing import Any

import torch

from services.trainer.contract import Check
from services.trainer.data.dataset import Rows
from services.trainer.data.layout import pack_rows
from services.trainer.model.forward import loss_sum, pack, training_forward
from services.trainer.model.precision import Precision


def evaluation_loss(model: Any, rows: Rows, token_budget: int, precision: Precision, check: Check) -> float:
    """Mean cross-entropy over all supervised tokens of `rows`, in nats. Draws no random number.

    Raises:
        StopRequested: between two micro-batches.
    """
    losses: list[torch.Tensor] = []
    with torch.no_grad(), training_forward(model, dropout=False):
        for micro_batch in pack_rows(list(range(len(rows))), rows.lengths, token_budget):
            check()
            with precision.autocast():
                losses.append(loss_sum(model, pack([rows[row] for row in micro_batch], precision.device)))
    # Read once, and last: a GPU computes on while its work is queued.
    return float(sum(torch.stack(losses).tolist())) / int(rows.supervised.sum())
