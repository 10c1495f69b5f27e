"""A base model's metadata, read without loading it: its chat template, linear modules, context and sizes.

Read from the safetensors header (8 bytes of length, then JSON: huggingface/safetensors, "Format"), so without torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from shared.datasets.tokens import chat_templates
from shared.errors import ArtifactCorrupt, NotFound
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.manifests import read_manifest
from shared.training.memory import ModelShape, model_shape

MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True, slots=True)
class BaseMetadata:
    """What job requests are checked against.

    Attributes:
        module_names: last parts of the names of all modules inside the layers that have a weight matrix.
        context: most tokens of one sequence; None if the model's configuration does not say.
        shape: what its memory is computed from; None if it is no Llama.
    """

    has_chat_template: bool
    module_names: frozenset[str]
    context: int | None = None
    shape: ModelShape | None = None


class BaseMetadataReader:
    """Metadata of the bases in an artifact store, read once each."""

    def __init__(self, artifacts: LocalArtifactStore) -> None:
        self._artifacts = artifacts
        self._known: dict[str, BaseMetadata] = {}

    def __call__(self, base_id: str) -> BaseMetadata | None:
        """The metadata; None if the base has not been prepared or cannot be read (loading it will say why)."""
        if base_id not in self._known:
            folder = self._artifacts.base(base_id)
            try:
                read_manifest(folder, "base")
                self._known[base_id] = _read(folder)
            except (NotFound, ArtifactCorrupt, OSError, ValueError, TypeError, KeyError):
                return None
        return self._known[base_id]


def _read(folder: Path) -> BaseMetadata:
    names = {name for file in sorted(folder.glob("*.safetensors")) for name in _matrices(file)}
    modules = frozenset(name.split(".")[-2] for name in names if ".layers." in name and name.endswith(".weight"))
    has_template = bool(chat_templates(folder))
    model = json.loads((folder / "config.json").read_bytes())
    context = model.get("max_position_embeddings")
    return BaseMetadata(has_template, modules, context if isinstance(context, int) else None, model_shape(model))


def _matrices(file: Path) -> list[str]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise ValueError("the header is too long")
        header = json.loads(stream.read(size))
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    return [name for name, tensor in header.items() if name != "__metadata__" and len(tensor["shape"]) == 2]
