"""What every server in the benchmark gets: the same base, prompts and adapters. Adapters are random: speed only."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from shared.bases.base_model import LoadedBase, load_base, prepare_base
from shared.bases.catalogue import load_catalogue
from shared.storage.artifacts import LocalArtifactStore, new_id
from shared.storage.manifests import Manifest

RANK, ALPHA, TARGETS = 8, 32, ("q_proj", "v_proj")
_SUBJECTS = [
    *("json.dumps", "os.path.join", "re.sub", "itertools.chain", "functools.reduce", "shutil.copytree", "math.isclose"),
    *("heapq.merge", "textwrap.fill", "random.shuffle", "statistics.median", "pathlib.Path.glob", "asyncio.gather"),
    *("bisect.insort", "copy.deepcopy", "datetime.timedelta", "decimal.Decimal", "difflib.ndiff", "enum.Enum"),
    *("fnmatch.filter", "glob.iglob", "gzip.open", "hashlib.sha256", "inspect.signature", "logging.getLogger"),
    *("operator.itemgetter", "pprint.pformat", "queue.Queue", "secrets.token_hex", "string.Template", "struct.pack"),
]


@dataclass(frozen=True, slots=True)
class Workload:
    """Everything the servers share.

    Attributes:
        adapters: ids in the store, of rank 8 on the query and value projections.
        tokens: new tokens of every request; no request ends earlier.
    """

    store: LocalArtifactStore
    loaded: LoadedBase
    adapters: list[str]
    tokens: int

    @property
    def base_folder(self) -> Path:
        return self.store.base(self.loaded.base.id)

    def prompt(self, number: int) -> list[int]:
        """Token ids of prompt `number`: an instruction about a function of Python's standard library."""
        text = f"### Instruction:\nWhat does `{_SUBJECTS[number % len(_SUBJECTS)]}` do in Python?\n\n### Response:\n"
        return self.loaded.tokenizer.encode(text, add_special_tokens=True)


def make_workload(root: Path, base_id: str, *, adapters: int, tokens: int) -> Workload:
    """Prepare the base in a store under `root` and publish random adapters of it."""
    store, base = LocalArtifactStore(root / "artifacts"), load_catalogue(None).get(base_id)
    manifest = prepare_base(base, store)
    loaded = load_base(base, store, "fp32", torch.device("cpu"))
    made = [_publish_adapter(store, manifest, loaded.model, seed) for seed in range(adapters)]
    return Workload(store, loaded, made, tokens)


def _publish_adapter(store: LocalArtifactStore, trained_on: Manifest, model: Any, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, module in model.named_modules():
        if path.endswith(TARGETS):
            for side, shape in (("A", (RANK, module.in_features)), ("B", (module.out_features, RANK))):
                tensors[f"base_model.model.{path}.lora_{side}.weight"] = 0.02 * torch.randn(shape, generator=generator)
    adapter_id = new_id("adapter")
    with store.staged() as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM", inference_mode=True
        ).save_pretrained(str(folder))
        manifest = Manifest(
            kind="adapter",
            id=adapter_id,
            step=1,
            base=trained_on.base,
            base_revision=trained_on.base_revision,
            base_sha256=trained_on.base_sha256,
            template="instruction-v1",
            files={},
        )
        store.publish(folder, store.adapter(adapter_id), manifest)
    return adapter_id
