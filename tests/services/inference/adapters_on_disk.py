"""Adapters for the tests, made with peft itself and published as the trainer publishes them."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from shared.storage.artifacts import LocalArtifactStore, new_id
from shared.storage.manifests import Manifest

EVERYTHING = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All linear layers of a Llama."""


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
    return _publish_peft(store, peft, base, template=template)


def write_reciter(store: LocalArtifactStore, model: Path, base: Manifest, *, prompt: list[int], text: list[int]) -> str:
    """An adapter that continues `prompt` with exactly the ids of `text`, on any processor; returns its id.

    It is solved, not trained. Random adapters in all layers make the last MLP's activations differ at every position,
    also where tokens repeat; the last `down_proj` is then the matrix that turns each of them into the direction of the
    next token. `text` may have no more tokens than the tiny model's MLP is wide, 64.
    """
    peft, width = _random_everywhere(model, seed=1, scale=0.3)
    layer = peft.base_model.model.model.layers[-1].mlp.down_proj
    embeddings = peft.get_input_embeddings().weight.detach().double()
    ids = torch.tensor([[*prompt, *text]])
    speaking = slice(len(prompt) - 1, len(prompt) + len(text) - 1)
    seen: dict[str, torch.Tensor] = {}
    norm = peft.base_model.model.model.norm
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: seen.update(mlp=inputs[0][0], added=output[0])),
        norm.register_forward_pre_hook(lambda module, inputs: seen.update(sum=inputs[0][0])),
    ]
    with torch.no_grad():
        peft(ids)
        for hook in hooks:
            hook.remove()
        residual = (seen["sum"] - seen["added"])[speaking].double()
        directions = torch.nn.functional.normalize(embeddings[text])
        wanted = residual.norm(dim=1).mean() * directions - residual
        solved = torch.linalg.lstsq(seen["mlp"][speaking].double(), wanted).solution.T
        layer.lora_A["default"].weight.copy_(solved - layer.base_layer.weight.double())
        layer.lora_B["default"].weight.copy_(torch.eye(width))
        logits = peft(ids).logits[0, speaking]
    own = logits.gather(1, torch.tensor(text)[:, None])
    others = logits.scatter(1, torch.tensor(text)[:, None], -torch.inf).amax(1, keepdim=True)
    # Kernels differ by less than a thousandth of this.
    assert float((own - others).min()) > 0.05, "another token is nearly as likely"
    return _publish_peft(store, peft, base, template="instruction-v1")


def _random_everywhere(model: Path, *, seed: int, scale: float) -> tuple[Any, int]:
    """peft's model with a random adapter of full rank on all linear layers, and that rank."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    width: int = loaded.config.hidden_size
    lora = LoraConfig(r=width, lora_alpha=width, target_modules=list(EVERYTHING))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        peft = get_peft_model(loaded, lora).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, scale, generator=generator)
    return peft, width


def _publish_peft(store: LocalArtifactStore, peft: Any, base: Manifest, *, template: str | None) -> str:
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
        return greedy(self._loaded[adapter], prompt, max_new_tokens)


def greedy(model: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The ids that transformers adds to a prompt, EOS included if it came; never by a hair.

    Logits of a tiny model are about 0.1 and differ by some 1e-7 between kernels. Where the two best are nearer than a
    hundred times that, another processor might say something else, and the test needs other weights or prompts.
    """
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=2,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best = torch.stack(output.logits)[:, 0].topk(2).values
    assert float((best[:, 0] - best[:, 1]).min()) > 1e-5, "a near tie: the text would depend on the processor"
    new: list[int] = output.sequences[0, len(prompt) :].tolist()
    return new
