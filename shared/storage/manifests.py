"""The manifest that makes an artifact folder trustworthy: what is in it, what it belongs to, and its own hash.

Owns how it is written and read. Does not know where folders lie, nor how they get there.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from shared.errors import ArtifactCorrupt, NotFound
from shared.frozen import Frozen

MANIFEST = "manifest.json"
# The manifest's own hash, a field beside the manifest's.
HASH_FIELD = "sha256"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")

Kind = Literal["base", "checkpoint", "adapter"]
FileName = Annotated[str, Field(pattern=f"^{_FILE_NAME.pattern}$")]


class FileEntry(Frozen):
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Manifest(Frozen):
    """What is in an artifact folder and what it belongs to. Written last; a folder without it does not exist.

    Attributes:
        id: the adapter's, base's or job's id.
        base: catalogue id of the base model, with its revision and the hash of its weights.
        precision: what the base was held in while training (`int8`, …).
        template: prompt format the adapter was trained with (`shared.datasets.templates`), and must be served with.
        data_sha256: hash of the uploaded training file; of several, `JobSpec.data_sha256`.
        versions: library name → version of everything that shaped the bytes.
    """

    format: Literal[1] = 1
    kind: Kind
    id: str
    job: str | None = None
    step: int | None = None
    base: str
    base_revision: str
    base_sha256: str
    precision: str | None = None
    template: str | None = None
    data_sha256: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    files: dict[FileName, FileEntry]


def read_manifest(folder: Path, kind: Kind) -> Manifest:
    """Read and validate a folder's manifest without hashing its files.

    Raises:
        NotFound: there is no such folder.
        ArtifactCorrupt: the manifest is missing, malformed, damaged or of another kind.
    """
    path = folder / MANIFEST
    if not folder.is_dir() or folder.is_symlink():
        raise NotFound(f"no artifact {folder.name}")
    if path.is_symlink() or not path.is_file() or path.stat().st_size > 1 << 20:
        raise ArtifactCorrupt(f"{folder.name}: no manifest")
    try:
        fields = json.loads(path.read_bytes())
        if not isinstance(fields, dict) or fields.pop(HASH_FIELD, None) != _hash_of(fields):
            raise ValueError(f"its {HASH_FIELD} is not that of its fields")
        manifest = Manifest.model_validate(fields)
    except (ValueError, RecursionError, ValidationError) as error:
        raise ArtifactCorrupt(f"{folder.name}: unreadable manifest: {error}") from error
    if manifest.kind != kind:
        raise ArtifactCorrupt(f"{folder.name}: a {manifest.kind}, not a {kind}")
    return manifest


def is_published(folder: Path, kind: Kind) -> bool:
    """Whether a folder has a manifest that can be read; its files are not hashed."""
    try:
        read_manifest(folder, kind)
    except (NotFound, ArtifactCorrupt, OSError):
        return False
    return True


def as_written(manifest: Manifest) -> str:
    """A manifest as it is written."""
    fields = manifest.model_dump(mode="json", exclude_none=True)
    return json.dumps(fields | {HASH_FIELD: _hash_of(fields)}, indent=2, ensure_ascii=False) + "\n"


def _hash_of(fields: dict[str, Any]) -> str:
    """SHA-256 of the fields as JSON in one form, so that a damaged disk cannot change what a folder belongs to.

    It keeps nobody from writing another manifest: who can write in the folder is trusted.
    """
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
