"""What the gateway reads of a prepared base, against a real (tiny) one."""

import json
from pathlib import Path

from services.gateway.bases.metadata import BaseMetadataReader
from shared.storage.artifacts import LocalArtifactStore
from tests.tiny import prepared_tiny

LLAMA_MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_prepared_base_tells_its_modules_and_template(tmp_path: Path) -> None:
    store, base, _ = prepared_tiny(tmp_path)
    metadata = BaseMetadataReader(store)(base.id)
    assert metadata is not None
    assert metadata.module_names == LLAMA_MODULES
    assert metadata.context == 512
    assert metadata.has_chat_template


def test_a_base_without_a_chat_template(tmp_path: Path) -> None:
    store, base, _ = prepared_tiny(tmp_path)
    (store.base(base.id) / "chat_template.jinja").unlink()
    metadata = BaseMetadataReader(store)(base.id)
    assert metadata is not None
    assert not metadata.has_chat_template


def test_what_cannot_be_read_is_not_known_and_asked_again(tmp_path: Path) -> None:
    bases = BaseMetadataReader(LocalArtifactStore(tmp_path / "artifacts"))
    assert bases("tiny") is None
    store, base, _ = prepared_tiny(tmp_path)
    assert bases(base.id) is not None
    weights = next(store.base(base.id).glob("*.safetensors"))
    whole = weights.read_bytes()
    for broken in (b"", b"\xff" * 8, (2**40).to_bytes(8, "little"), whole[:100], b"\x02" + bytes(7) + b"[]"):
        weights.write_bytes(broken)
        assert BaseMetadataReader(store)(base.id) is None
    header = json.dumps({"a": 1}).encode()
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    assert BaseMetadataReader(store)(base.id) is None
