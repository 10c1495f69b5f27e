"""Starting from an adapter that was trained before, instead of from LoRA's untrained weights."""

import torch
from peft import PeftModel
from safetensors.torch import load_file

from services.trainer.model.bases import TrainableBase
from services.trainer.model.lora import trainable
from shared.errors import ArtifactCorrupt, JobFailed, NotFound
from shared.storage.artifacts import ADAPTER_WEIGHTS, LocalArtifactStore


def load_initial_adapter(model: PeftModel, adapter_id: str, base: TrainableBase, store: LocalArtifactStore) -> None:
    """Copy an adapter's weights into freshly attached LoRA of the same shape, in place.

    Raises:
        JobFailed: `initial_adapter`: it is gone or damaged, belongs to other base weights, or has another shape.
    """
    folder = store.adapter(adapter_id)
    try:
        manifest = store.verify(folder, "adapter")
    except (NotFound, ArtifactCorrupt) as error:
        raise JobFailed(f"the adapter to start from cannot be used: {error.message}", code="initial_adapter") from error
    if manifest.base_sha256 != base.loaded.sha256:
        raise JobFailed("the adapter to start from belongs to other base weights", code="initial_adapter")
    tensors, parameters = load_file(folder / ADAPTER_WEIGHTS), trainable(model)
    # peft leaves the adapter's name out of what it saves.
    shapes = {name.replace(".default.", "."): parameter.shape for name, parameter in parameters.items()}
    if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        raise JobFailed("the adapter to start from has another LoRA shape", code="initial_adapter")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name.replace(".default.", ".")])
