"""The fingerprint of a frozen base as it lies in memory: it shows that no bit of it has changed.

On a CPU, SHA-256 reads all of it. Of what lies on a GPU it would need a copy on the host, after every job; there each
block of words is mixed down to one on the device, and SHA-256 reads those. `torch.hash_tensor` would not do: it is the
XOR of all elements, the same in any order.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# 16 MB: large enough for the device to be busy, small beside any base. Three such blocks are there at a time.
BLOCK_WORDS = 1 << 21
# The finaliser of SplitMix64 (Steele, Lea and Flood 2014): shifts and odd factors, each step reversible.
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def fingerprint(model: nn.Module, *, mixed: bool | None = None) -> str:
    """Hash of all parameters and buffers as they lie in memory, and of all that bitsandbytes keeps beside them.

    Args:
        mixed: whether blocks are mixed down before SHA-256 reads them; None does that on GPUs alone. The two give
            different fingerprints.
    """
    digest, on_device = hashlib.sha256(), []
    for name, tensor in frozen_tensors(model):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        if tensor.device.type != "cpu" if mixed is None else mixed:
            on_device.append(tensor)
        else:
            digest.update(_bytes_of(tensor).numpy().data)
    if on_device:
        block_words = min(BLOCK_WORDS, max(_word_count(tensor.nbytes) for tensor in on_device))
        mixer = BlockMixer(on_device[0].device, block_words)
        words = torch.cat([mixer.words(tensor) for tensor in on_device])
        # The one wait for the device.
        digest.update(words.cpu().numpy().data)
    return digest.hexdigest()


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that makes up a model's weights, each memory once, in an order that does not change."""
    seen: set[tuple[int, int]] = set()
    for name, module in sorted(model.named_modules(), key=lambda item: item[0]):
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        for key, tensor in sorted((tensors | _quantisation_tensors(module)).items()):
            memory = tensor.data_ptr(), tensor.nbytes
            if memory not in seen:
                seen.add(memory)
                yield f"{name}.{key}", tensor.data


def _quantisation_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What bitsandbytes holds outside of parameters and buffers."""
    weight: Any = getattr(module, "weight", None)
    found = dict(_state_tensors("quant_state", getattr(weight, "quant_state", None)))
    for key in ("CB", "SCB"):
        # The first forward pass of an int8 layer moves them from the weight to the layer's state.
        holders = (weight, getattr(module, "state", None))
        tensor = next((held for of in holders if (held := getattr(of, key, None)) is not None), None)
        # int8 weights themselves are both the parameter and CB.
        if isinstance(tensor, Tensor) and tensor.data_ptr() != weight.data_ptr():
            found[key] = tensor
    return found


def _state_tensors(name: str, state: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a 4-bit weight's state and of the state that its own scales are quantised by."""
    for key, value in getattr(state, "__dict__", {}).items():
        if isinstance(value, Tensor):
            yield f"{name}.{key}", value
        elif type(value) is type(state):
            yield from _state_tensors(f"{name}.{key}", value)


class BlockMixer:
    """Mixes tensors down to a word for each block, on their own device.

    A word w at place i of a block becomes mix(w XOR key[i]), and the block the sum of these modulo 2^64. Words are
    mixed reversibly: a block in which one has changed never has the sum it had. Where several have changed, or changed
    places, it has by a chance of 2^-64. That is for accidents; somebody who looks for such changes finds some.

    Args:
        block_words: 64-bit words of a block.
    """

    def __init__(self, device: torch.device, block_words: int = BLOCK_WORDS) -> None:
        self._block, self._shifted = (torch.empty(block_words, dtype=torch.int64, device=device) for _ in range(2))
        self._keys = torch.arange(block_words, dtype=torch.int64, device=device)
        self._mix(self._keys, self._shifted)

    def words(self, tensor: Tensor) -> Tensor:
        """int64 [blocks], on the tensor's device; the last block is filled up with zeros."""
        size, content = self._block.nbytes, _bytes_of(tensor)
        blocks = [self._word(content[start : start + size]) for start in range(0, len(content), size)]
        return torch.stack(blocks) if blocks else self._keys[:0]

    def _word(self, part: Tensor) -> Tensor:
        """The word of a block of uint8 [bytes], as an int64 scalar."""
        count = _word_count(len(part))
        block, shifted = self._block[:count], self._shifted[:count]
        # Copied first: a slice of a joined matrix need not begin where a word does.
        block[-1:].zero_()
        block.view(torch.uint8)[: len(part)].copy_(part)
        self._mix(block.bitwise_xor_(self._keys[:count]), shifted)
        return block.sum()

    @staticmethod
    def _mix(x: Tensor, shifted: Tensor) -> None:
        """Mix the words of int64 x [words] in place; `shifted` is memory of the same size."""
        for bits, factor in _ROUNDS:
            # int64 is shifted with its sign; torch has no products of uint64 on every device.
            torch.bitwise_right_shift(x, bits, out=shifted).bitwise_and_((1 << (64 - bits)) - 1)
            x.bitwise_xor_(shifted).mul_(factor if factor < 1 << 63 else factor - (1 << 64))


def _word_count(size: int) -> int:
    """64-bit words that so many bytes fill or begin."""
    return -(-size // 8)


def _bytes_of(tensor: Tensor) -> Tensor:
    """A tensor's numbers as they lie in memory: uint8 [bytes]."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
