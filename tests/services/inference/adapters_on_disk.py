"""Adapters for the tests, made with peft itself and published as the trainer publishes them."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from shared.storage.artifacts import LocalArtifactStore, Manifest, new_id


def write_adapter(
    store: LocalArtifactStore,
    model: Path,
    base: Manifest,
    *,
    seed: int,
    r: int = 8,
    alpha: float = 16,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    rslora: bool = False,
    scale: float = 0.3,
    template: str | None = "instruction-v1",
    **config: Any,
) -> str:
    """A random adapter whose effect is large enough to change what is said; returns its id."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=r, lora_alpha=alpha, target_modules=list(targets), use_rslora=rslora, **config)
    with warnings.catch_warnings():
        # peft 0.21 reads a property that transformers 5.23 has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        peft = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), lora)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, scale)
    adapter_id = new_id("adapter")
    with store.staged() as folder:
        peft.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)
        publish(store, folder, adapter_id, base, template=template)
    return adapter_id


def publish(
    store: LocalArtifactStore,
    folder: Path,
    adapter_id: str,
    trained_on: Manifest,
    *,
    template: str | None,
    **changes: Any,
) -> Manifest:
    """Publish a staged adapter folder with a manifest of the given base."""
    fields: dict[str, Any] = {
        "kind": "adapter",
        "id": adapter_id,
        "job": "ftjob-test",
        "step": 7,
        "base": trained_on.base,
        "base_revision": trained_on.base_revision,
        "base_sha256": trained_on.base_sha256,
        "template": template,
        "files": {},
    }
    return store.publish(folder, store.adapter(adapter_id), Manifest.model_validate(fields | changes))


class Oracle:
    """Greedy continuation by transformers and peft, one request at a time."""

    def __init__(self, store: LocalArtifactStore, model: Path) -> None:
        self._store = store
        self._model = model
        self._loaded: dict[str | None, Any] = {}

    def ids(self, adapter: str | None, prompt: list[int], max_new_tokens: int) -> list[int]:
        """New token ids, EOS included if it came."""
        if adapter not in self._loaded:
            model = AutoModelForCausalLM.from_pretrained(self._model, dtype=torch.float32)
            if adapter is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)
                    model = PeftModel.from_pretrained(model, str(self._store.adapter(adapter)))
            self._loaded[adapter] = model.eval()
        ids = torch.tensor([prompt])
        with torch.no_grad():
            output = self._loaded[adapter].generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=2,
            )
        new: list[int] = output[0, len(prompt) :].tolist()
        return new
