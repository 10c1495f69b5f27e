"""Whether a folder is an adapter of the base that is served: its manifest, and the template it was trained with."""

from pathlib import Path
from typing import Protocol

from services.inference.adapters.weights import refuse
from shared.datasets.templates import Template, template_by_id
from shared.datasets.tokens import Tokenizer
from shared.errors import InvalidRequest
from shared.storage.artifacts import ADAPTER_WEIGHTS, LocalArtifactStore
from shared.storage.manifests import Manifest


class Served(Protocol):
    """The base that is served."""

    @property
    def id(self) -> str: ...
    @property
    def sha256(self) -> str:
        """Of its weights."""
        ...


def verified(
    folder: Path, base: Served, tokenizer: Tokenizer, store: LocalArtifactStore, most_bytes: int
) -> tuple[Manifest, Template | None]:
    """Verify an adapter folder, and see that it belongs to this base.

    Args:
        most_bytes: of its weights.

    Raises:
        NotFound, ArtifactCorrupt: see `LocalArtifactStore.verify`.
        InvalidRequest: code `adapter_refused`, with the reason.
    """
    manifest = store.verify(folder, "adapter")
    if manifest.id != folder.name:
        raise refuse(f"its manifest is {manifest.id[:100]}'s")
    if (manifest.base, manifest.base_sha256) != (base.id, base.sha256):
        same = "other weights of it" if manifest.base == base.id else f"this server has {base.id}"
        raise refuse(f"it was trained on the base {manifest.base} ({same})")
    if ADAPTER_WEIGHTS not in manifest.files:
        raise refuse(f"it has no {ADAPTER_WEIGHTS}")
    if manifest.files[ADAPTER_WEIGHTS].size > most_bytes:
        raise refuse(f"it is larger than this server's budget of {most_bytes} bytes")
    try:
        template = template_by_id(manifest.template, tokenizer.chat) if manifest.template else None
    except InvalidRequest as error:
        raise refuse(error.message) from None
    return manifest, template
