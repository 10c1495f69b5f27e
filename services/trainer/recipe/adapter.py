"""The servable adapter folder: two files in plain peft format and the manifest.

Its weights' bytes depend only on what was trained: they contain no time, id or lease.
"""

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from services.trainer.contract import JobRun
from services.trainer.model.bases import TrainableBase
from shared.bases.base_model import library_versions
from shared.bases.catalogue import Base
from shared.storage.artifacts import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from shared.storage.manifests import Manifest

# What readers (peft of any version, vLLM) expect to find even where it is the default.
_ALWAYS = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "bias",
    "use_rslora",
    "fan_in_fan_out",
    "inference_mode",
)


def write_adapter(folder: Path, model: PeftModel, base: Base) -> None:
    """Write the LoRA weights (fp32) and their configuration into a staged folder."""
    # `save_embedding_layers` left to itself may ask the hub about the base.
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / ADAPTER_WEIGHTS, {"format": "pt"}
    )
    config = _config(model.peft_config["default"], base)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _config(lora: LoraConfig, base: Base) -> dict[str, Any]:
    """peft's configuration without defaults: older versions refuse keys they do not know."""
    values, defaults = lora.to_dict(), LoraConfig().to_dict()
    values |= {"base_model_name_or_path": canonical_name(base), "revision": base.revision, "inference_mode": True}
    values["target_modules"] = sorted(values["target_modules"])
    return {key: value for key, value in values.items() if key in _ALWAYS or value != defaults.get(key)}


def canonical_name(base: Base) -> str:
    """The base's public name: its hub repository, or its catalogue id if it does not come from the hub."""
    return base.source.removeprefix("hub:").partition("@")[0] if base.source.startswith("hub:") else base.id


def adapter_manifest(job: JobRun, adapter_id: str, step: int, base: TrainableBase, template: str) -> Manifest:
    """The manifest of an adapter, its files still to be filled in by `LocalArtifactStore.publish`."""
    return Manifest(
        kind="adapter",
        id=adapter_id,
        job=job.job_id,
        step=step,
        base=base.loaded.base.id,
        base_revision=base.loaded.base.revision,
        base_sha256=base.loaded.sha256,
        precision=base.loaded.precision,
        template=template,
        data_sha256=job.spec.data_sha256,
        versions=library_versions(),
        files={},
    )
