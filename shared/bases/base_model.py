"""The one shared file that knows torch: preparing a base model once, and loading it in a precision.

Owns the form of `artifacts/bases/<id>` (safetensors, tokenizer.json, chat template, manifest) and how bitsandbytes is
asked for. Knows nothing of jobs, adapters or HTTP.
"""

import hashlib
import importlib.util
import json
import logging
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.bases.catalogue import Base
from shared.bases.hub import download
from shared.datasets.tokens import ADDITIONAL_TEMPLATES, Tokenizer, chat_templates
from shared.errors import ArtifactCorrupt, NotFound, Unavailable
from shared.jobs.spec import BasePrecision
from shared.processor import this_processor
from shared.storage.artifacts import LocalArtifactStore, sha256_of
from shared.storage.manifests import Manifest

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Bases whose weights are no more exact than bf16; fp16's are, so rounding them to bf16 would lose something.
_COARSE = ("int8", "nf4", "bf16")


@dataclass(slots=True)
class LoadedBase:
    """A base model in memory.

    Attributes:
        model: transformers' causal LM, in eval mode, every parameter frozen.
        quantized_layers: linear layers held by bitsandbytes.
        megabytes: parameters and buffers as they lie in memory, MB of 10^6 bytes.
        sha256: hash of the prepared weights, as in manifests.
    """

    base: Base
    model: Any
    tokenizer: Tokenizer
    precision: BasePrecision
    device: torch.device
    sha256: str
    quantized_layers: int
    megabytes: float


def prepare_device(device: torch.device) -> None:
    """Set what this process computes with on a device; to be called before a model does.

    cuDNN's attention, torch's first choice on Hopper, prepares a kernel for every new length, and every step has one:
    on an H200 that took longer than the rest of the step (9,500 against 21,500 tokens/s of training).
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def device_answers(device: torch.device) -> bool:
    """Whether a device still computes; asked after an error that nothing explains.

    A GPU's illegal access, failed launch or uncorrectable memory error (not out of memory) ends this process's context
    with it: from then on every call fails with the same error, and only another process can use the device.
    """
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def compute_dtype(name: str, device: torch.device, precision: BasePrecision = "fp32") -> torch.dtype:
    """The dtype matrix products run in.

    `auto` is bf16 from compute capability 8 and fp16 below. On a CPU it is fp32, but bf16 for a base that is held less
    exactly than that, where the processor multiplies bf16. `torch.cuda.is_bf16_supported()` is not asked: a T4 answers
    True and emulates.
    """
    if name != "auto":
        return _DTYPES[name]
    if device.type != "cuda":
        coarse = precision in _COARSE
        return torch.bfloat16 if coarse and this_processor().multiplies_bf16 else torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def prepare_base(base: Base, store: LocalArtifactStore) -> Manifest:
    """Bring a base model into the artifact store once; verifies and returns what is there if it is there.

    Raises:
        Unavailable: the hub cannot be reached or does not give the model, or the source is missing on this machine.
    """
    target = store.base(base.id)
    try:
        return store.verify(target, "base")
    except NotFound:
        pass
    with store.staged() as folder:
        _write_base(base, folder)
        weights = sorted(folder.glob("*.safetensors"))
        if not weights or not (folder / "tokenizer.json").is_file():
            raise Unavailable(
                f"{base.id}: the source has no safetensors weights or no tokenizer.json", code="base_unavailable"
            )
        digest = hashlib.sha256("".join(sha256_of(path) for path in weights).encode()).hexdigest()
        manifest = Manifest(
            kind="base",
            id=f"base-{base.id}",
            base=base.id,
            base_revision=base.revision,
            base_sha256=digest,
            versions=library_versions(),
            files={},
        )
        try:
            return store.publish(folder, target, manifest)
        except FileExistsError:
            # Another process prepared it meanwhile.
            return store.verify(target, "base")


def library_versions() -> dict[str, str]:
    """Versions of what shapes weights and numbers."""
    names = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "tokenizers")
    return {name: _version(name) for name in names}


_UNAVAILABLE = "base_unavailable"
# Every manifest has them, and finding one reads several files.
_version = cache(version)


def _write_base(base: Base, folder: Path) -> None:
    kind, _, rest = base.source.partition(":")
    if kind == "package":
        package, _, file = rest.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise Unavailable(
                f"{base.id}: the Python package {package} that ships it is not installed", code="base_unavailable"
            )
        _convert_gguf(Path(spec.origin).parent, file, folder)
    elif kind == "folder":
        _copy_folder(Path(rest), folder)
    else:
        repo, _, revision = rest.partition("@")
        _copy_folder(download(repo, revision), folder)


def _convert_gguf(source: Path, file: str, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)


def _copy_folder(source: Path, folder: Path) -> None:
    import shutil

    names = [p.name for p in source.glob("*.safetensors")] + ["config.json", *TOKENIZER_FILES]
    for name in [*names, "model.safetensors.index.json"]:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / ADDITIONAL_TEMPLATES).is_dir():
        # A prepared base has no folders; transformers reads several templates from the configuration as well.
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
        templates = chat_templates(source)
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "chat_template.jinja").unlink(missing_ok=True)


def load_base(
    base: Base,
    store: LocalArtifactStore,
    precision: BasePrecision,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> LoadedBase:
    """Load a prepared base, frozen and in eval mode.

    Args:
        precision: `int8` and `nf4` through bitsandbytes; else the dtype the weights are held in.
        dtype: what non-quantised parts are held in when `precision` is int8 or nf4.

    Raises:
        NotFound: the base was not prepared.
        ArtifactCorrupt: the folder does not verify, or a weight is missing or unexpected.
    """
    from transformers import AutoModelForCausalLM

    folder = store.base(base.id)
    manifest = store.verify(folder, "base")
    prepare_device(device)
    quantization = quantization_config(precision, dtype)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype if quantization else _DTYPES[precision],
        quantization_config=quantization,
        device_map={"": device},
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong:
        raise ArtifactCorrupt(f"{base.id}: weights do not fit the model: {wrong[:4]}")
    model.eval().requires_grad_(False)
    return LoadedBase(
        base=base,
        model=model,
        tokenizer=Tokenizer(folder),
        precision=precision,
        device=device,
        sha256=manifest.base_sha256,
        quantized_layers=count_quantized(model),
        megabytes=memory_megabytes(model),
    )


def quantization_config(precision: BasePrecision, dtype: torch.dtype) -> Any | None:
    """bitsandbytes' configuration for a precision; None where there is nothing to quantise.

    nf4 with double quantisation is QLoRA's (Dettmers et al. 2023).
    """
    from transformers import BitsAndBytesConfig

    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if precision == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return None


def count_quantized(model: nn.Module) -> int:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return sum(isinstance(module, Linear4bit | Linear8bitLt) for module in model.modules())


def memory_megabytes(model: nn.Module) -> float:
    """Bytes of all distinct parameters and buffers, in MB of 10^6 bytes (tied weights count once)."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values()) / 1e6


def quiet_libraries() -> None:
    """Keep transformers' and bitsandbytes' progress bars and advice out of the service's JSON log."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
