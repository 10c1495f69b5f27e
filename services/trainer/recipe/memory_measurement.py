"""What training needs beside the loaded base, measured: the activations that a forward pass of a few tokens saves.

It is the model as it will train, on its own device; the need grows with the tokens of a micro-batch.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.trainer.model.forward import Packed, loss_sum, pack, training_forward
from services.trainer.model.llama import fused_form
from services.trainer.model.lora import Parameters
from services.trainer.model.precision import Precision
from services.trainer.recipe.memory import Need
from services.trainer.recipe.rng import RandomState
from shared.training.memory import FRAGMENTATION, OPTIMIZER_BYTES, logits_bytes

# Enough that what is saved for every token outweighs what is saved once.
PROBE_TOKENS = 64
# On a GPU, a second measurement tells the two apart.
LONG_PROBE_TOKENS = 512
# The backward pass works on one layer at a time; measured, it takes up to four times what the layer saved.
LAYERS_AT_WORK = 4


def measure_need(
    model: Any, parameters: Parameters, ids: NDArray[np.int64], share: float, precision: Precision
) -> Need:
    """Bytes that training `parameters` of a model needs, measured by a forward pass over `ids`, int64 [tokens].

    The process's random state is left as it was.

    Args:
        share: of the tokens that are supervised, between 0 and 1.
    """
    random = RandomState.capture(precision.device)
    with training_forward(model, dropout=True):
        each, once = _saved_by_tokens(model, ids, share, precision)
    random.restore(precision.device)
    vocabulary = model.config.vocab_size
    # The weights themselves are there already.
    fixed = once + OPTIMIZER_BYTES * sum(parameter.numel() for parameter in parameters.values())
    with precision.autocast():
        fused = fused_form(model)
    # What is kept in bf16 is worked on in fp32.
    at_work = 2 * LAYERS_AT_WORK if fused is not None and fused.kept is not None else LAYERS_AT_WORK
    per_token = each * (FRAGMENTATION + at_work / model.config.num_hidden_layers)
    if fused is not None:
        return Need(fixed + logits_bytes(vocabulary, fused.loss_rows), per_token)
    return Need(fixed, per_token + logits_bytes(vocabulary, share))


def _saved_by_tokens(model: Any, ids: NDArray[np.int64], share: float, precision: Precision) -> tuple[float, float]:
    """Bytes saved per token, and once: on a GPU, autocast keeps half-precision copies of fp32 weights."""

    def saved(tokens: int) -> int:
        probe = np.resize(ids, tokens)
        supervised = np.arange(tokens) >= tokens - max(1, round(share * (tokens - 1)))
        return saved_activation_bytes(model, pack([(probe, supervised)], precision.device), precision)

    few = saved(PROBE_TOKENS)
    if precision.device.type == "cpu":
        return few / PROBE_TOKENS, 0.0
    many = saved(LONG_PROBE_TOKENS)
    each = (many - few) / (LONG_PROBE_TOKENS - PROBE_TOKENS)
    return each, max(0.0, few - each * PROBE_TOKENS)


def saved_activation_bytes(model: Any, packed: Packed, precision: Precision) -> int:
    """Bytes of activations that the forward pass of a pack saves for its gradient; shared memory counts once."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        # While the graph lives, no tensor gets the address of one that it has saved.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        # Not the tensor itself: a function's own output would hold the graph that holds it, for ever, and the graph the
        # model (torch's documentation of saved_tensors_hooks).
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), precision.autocast():
        loss = loss_sum(model, packed)
    for tensor in _held_elsewhere(loss):
        note(tensor)
    return sum(saved.values())


def _held_elsewhere(loss: Tensor) -> Iterator[Tensor]:
    """Tensors that a graph's functions hold as attributes of their own: bitsandbytes' do."""
    seen: set[Any] = set()
    functions: list[Any] = [loss.grad_fn]
    while functions:
        function = functions.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        for value in getattr(function, "__dict__", {}).values():
            values = value if isinstance(value, list | tuple) else [value]
            yield from (tensor for tensor in values if isinstance(tensor, Tensor))
        functions += [following for following, _ in function.next_functions]
