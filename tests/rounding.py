"""How far two correct computations of one number may lie apart: by the dtype and the sums on the way, on any machine.

Kernels add in an order of their own, which depends on the processor. A sum of n products carries, with overwhelming
probability, a relative error of at most `CONFIDENCE * sqrt(n) * u`, u being the unit roundoff of the dtype (Higham and
Mary 2019, "A New Approach to Probabilistic Rounding Error Analysis", theorem 2.4), as a random walk of n steps. Sums
that read one another's results lengthen the walk, and two computations may err in opposite directions. A wrong formula
is off by orders more.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch

CONFIDENCE = 4.0


def rounding(dtype: torch.dtype, sums: Iterable[int]) -> float:
    """The relative difference, by norm, that two computations of one result may show.

    Args:
        dtype: the narrowest that is computed in.
        sums: number of terms of each sum on the way to the result, one after the other.
    """
    unit = torch.finfo(dtype).eps / 2
    return 2 * CONFIDENCE * unit * math.sqrt(sum(sums))


def llama_sums(config: Any, tokens: int, *, backward: bool = False) -> list[int]:
    """Numbers of terms of the sums from a Llama's embeddings to its loss; gradients pass the same way back.

    Args:
        config: transformers' `LlamaConfig`.
        tokens: of the longest sample, over which attention sums.
    """
    hidden, wide, head = int(config.hidden_size), int(config.intermediate_size), int(config.head_dim)
    attention, mlp = [hidden, hidden, head, tokens, tokens, hidden], [hidden, hidden, wide]
    forward = int(config.num_hidden_layers) * (attention + mlp) + [hidden, hidden, int(config.vocab_size)]
    return forward * (2 if backward else 1)


def close(actual: torch.Tensor, expected: torch.Tensor, bound: float, *, at_least: float = 0.0) -> bool:
    """Whether the norm of the difference is within `bound` of the norm of what is expected, or of `at_least`.

    What cancels to zero keeps the rounding of what it was summed from: `at_least` is the size of that.
    """
    difference = (actual - expected).detach()
    return float(difference.norm()) <= bound * max(float(expected.detach().norm()), at_least)
