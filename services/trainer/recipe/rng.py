"""The process's random state as a value: captured after every whole step, restored when a step is discarded."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RandomState:
    """State of Python's, numpy's and torch's generators (on a GPU also its own)."""

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> "RandomState":
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state(), cuda)  # type: ignore[arg-type]

    def restore(self, device: torch.device) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        # A run that is continued on another kind of device leaves its generator there.
        if self.cuda is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.cuda, device)

    def tensors(self) -> dict[str, Tensor]:
        return {"cpu": self.cpu} | ({"cuda": self.cuda} if self.cuda is not None else {})

    def as_json(self) -> dict[str, Any]:
        name, keys, *rest = self.numpy
        return {"python": self.python, "numpy": [name, keys.tolist(), *rest]}

    @classmethod
    def from_parts(cls, values: dict[str, Any], tensors: dict[str, Tensor]) -> "RandomState":
        version, words, gauss = values["python"]
        name, keys, *rest = values["numpy"]
        numpy_state = (name, np.asarray(keys, np.uint32), *rest)
        return cls((version, tuple(words), gauss), numpy_state, tensors["cpu"], tensors.get("cuda"))
