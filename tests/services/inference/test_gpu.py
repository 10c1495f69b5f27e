"""What serving must hold on a CUDA device (`make test-gpu`); skipped, and said to be, where there is none."""

import asyncio
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from services.inference.adapters.weights import read_adapter
from services.inference.build import build_serving
from services.inference.engine.admission import Admission
from services.inference.engine.batch_engine import BatchEngine
from services.inference.engine.fused_lora import FusedAdapter
from services.inference.engine.interface import Finished, GenerationRequest, Sampling
from services.inference.engine.llama import LlamaRunner
from services.inference.engine.rows import MOST_GPU_ROWS
from services.inference.engine.transformers_runner import TransformersRunner
from services.inference.precision import ServingPrecision
from services.inference.settings import InferenceSettings
from shared.bases.base_model import load_base
from shared.datasets.tokens import Tokenizer
from shared.errors import Overloaded
from shared.jobs.spec import BasePrecision
from shared.storage.artifacts import LocalArtifactStore
from tests.services.inference.adapters_on_disk import write_adapter
from tests.services.inference.engine.test_batch_engine import PROMPTS
from tests.services.inference.engine.test_llama import CONFIGS, model_of
from tests.services.inference.harness import Heard, Tiny
from tests.services.inference.test_build import texts
from tests.tiny import tiny_catalogue, write_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")


class OnCuda:
    """An engine on the tiny base on the device, in one of its precisions."""

    def __init__(self, tiny: Tiny, precision: BasePrecision, *, own: bool, rows: int = 8) -> None:
        self.tiny = tiny
        loaded = load_base(tiny.base, tiny.store, precision, CUDA, torch.bfloat16)
        self.tokenizer: Tokenizer = loaded.tokenizer
        size: dict[str, int] = {"rows": rows, "context": 256, "adapter_slots": 8}
        self.runner: LlamaRunner | TransformersRunner = (
            LlamaRunner(loaded.model, precision="plain", **size) if own else TransformersRunner(loaded.model, **size)
        )
        self.engine = BatchEngine(
            self.runner, loaded.tokenizer, Admission(requests=1000, tokens=1_000_000), prefill_chunk=64
        )

    def load(self, adapter: str) -> None:
        folder = self.tiny.store.adapter(adapter)
        weights = read_adapter(folder, self.engine.lora_modules, max_rank=256, dtype=self.runner.dtype)
        self.engine.load(adapter, self.engine.prepare(weights)).result(120)

    def prompt(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=True)

    def submit(self, prompt: list[int], **options: Any) -> Heard:
        heard = Heard()
        self.engine.submit(GenerationRequest(prompt, **options), heard)
        return heard


@pytest.fixture
def engines(tiny: Tiny) -> Iterator[Any]:
    made: list[OnCuda] = []

    def make(precision: BasePrecision, *, own: bool = True, rows: int = 8) -> OnCuda:
        made.append(OnCuda(tiny, precision, own=own, rows=rows))
        return made[-1]

    yield make
    for each in made:
        each.engine.close()


def work_on(engine: OnCuda, adapters: list[str], count: int = 40) -> list[tuple[str | None, list[int], int]]:
    chance = random.Random(3)
    return [
        (chance.choice([None, *adapters]), engine.prompt(chance.choice(PROMPTS)), chance.randint(1, 24))
        for _ in range(count)
    ]


@pytest.mark.parametrize("own", [True, False], ids=["own", "transformers"])
def test_mixed_rows_in_fp32_say_what_peft_says(engines: Any, tiny: Tiny, adapters: list[str], own: bool) -> None:
    engine = engines("fp32", own=own)
    for adapter in adapters:
        engine.load(adapter)
    work = work_on(engine, adapters)
    heard = [engine.submit(prompt, adapter=adapter, max_new_tokens=n) for adapter, prompt, n in work]
    for (served, prompt, n), each in zip(work, heard, strict=True):
        assert isinstance(each.last, Finished), each.last
        assert each.ids == tiny.oracle.ids(served, prompt, n)


def test_adapters_come_and_go_while_others_are_served(engines: Any, tiny: Tiny, adapters: list[str]) -> None:
    engine = engines("fp32")
    engine.load(adapters[0])
    prompt = engine.prompt(PROMPTS[1])
    long = [engine.submit(prompt, adapter=adapters[0], max_new_tokens=120) for _ in range(3)]
    for adapter in adapters[1:]:
        engine.load(adapter)
        heard = engine.submit(prompt, adapter=adapter, max_new_tokens=12)
        assert isinstance(heard.last, Finished)
        assert heard.ids == tiny.oracle.ids(adapter, prompt, 12)
        engine.engine.unload(adapter).result(120)
    for each in long:
        assert isinstance(each.last, Finished)
        assert each.ids == tiny.oracle.ids(adapters[0], prompt, 120)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_rows_choose_what_peft_finds_best(
    engines: Any, tiny: Tiny, adapters: list[str], precision: BasePrecision
) -> None:
    """Rounding may decide between near equals, so each chosen token is held against fp32's own scores."""
    engine = engines(precision)
    for adapter in adapters:
        engine.load(adapter)
    work = work_on(engine, adapters)
    heard = [engine.submit(prompt, adapter=adapter, max_new_tokens=n) for adapter, prompt, n in work]
    slack = {"bf16": 0.3, "fp16": 0.05}[precision]
    for (served, prompt, _), each in zip(work, heard, strict=True):
        assert isinstance(each.last, Finished), each.last
        logits = oracle_logits(tiny, served, [*prompt, *each.ids])[len(prompt) - 1 : -1]
        behind = logits.amax(-1) - logits.gather(1, torch.tensor(each.ids)[:, None])[:, 0]
        assert float(behind.max()) <= slack * float(logits.std()), (served, behind.tolist())


def oracle_logits(tiny: Tiny, adapter: str | None, ids: list[int]) -> torch.Tensor:
    tiny.oracle.ids(adapter, ids[:1], 1)
    with torch.no_grad():
        logits: torch.Tensor = tiny.oracle._loaded[adapter](input_ids=torch.tensor([ids])).logits[0]
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_no_further_from_the_truth_than_transformers(name: str, dtype: torch.dtype) -> None:
    """The truth is fp32 on the CPU; transformers' own forward on the device in the same dtype is the yardstick."""
    model = model_of(name)
    prompts = [torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(length)) for length in (20, 33)]
    with torch.inference_mode():
        truth = torch.stack([model(prompt[None]).logits[0, -1] for prompt in prompts])
        model.to(CUDA, dtype)
        theirs = torch.stack([model(prompt[None].to(CUDA)).logits[0, -1] for prompt in prompts]).float().cpu()
        runner = LlamaRunner(model, precision="plain", rows=2, context=64, adapter_slots=1)
        for row, prompt in enumerate(prompts):
            runner.prefill(row, prompt[:3].tolist(), 0, 0, all_logits=False)
            runner.prefill(row, prompt[3:-1].tolist(), 3, 0, all_logits=False)
        ends = [len(prompt) - 1 for prompt in prompts]
        ours = runner.decode(0, [int(prompt[-1]) for prompt in prompts], ends, [0, 0]).cpu()
    off, allowed = ((logits - truth).norm() / truth.norm() for logits in (ours, theirs))
    assert float(off) <= 2 * float(allowed) + 1e-5


def test_a_seed_gives_the_same_text_again_and_sampling_is_on_the_device(engines: Any) -> None:
    engine = engines("fp32")
    prompt = engine.prompt(PROMPTS[0])
    sampling = Sampling(do_sample=True, temperature=1.0, top_k=50, top_p=0.9, seed=11)
    first, again = (engine.submit(prompt, max_new_tokens=16, sampling=sampling) for _ in range(2))
    assert isinstance(first.last, Finished), first.last
    assert isinstance(again.last, Finished)
    assert first.ids == again.ids
    other = engine.submit(prompt, max_new_tokens=16, sampling=Sampling(do_sample=True, seed=12))
    assert isinstance(other.last, Finished)
    assert other.ids != first.ids


@pytest.mark.parametrize("requested", ["auto", "bf16", "fp16", "fp32", "int8", "nf4"])
def test_each_precision_serves_base_and_adapters(tmp_path: Path, requested: ServingPrecision) -> None:
    model = write_tiny_model(tmp_path / "model", hidden=64)
    store, catalogue = LocalArtifactStore(tmp_path / "artifacts"), tiny_catalogue(model)
    serving = build_serving(InferenceSettings(precision=requested, slots=4, context=64), store, catalogue)
    assert serving.base.device == "cuda"
    assert serving.base.precision == ("bf16" if requested == "auto" else requested)
    assert serving.base.runner == ("transformers" if requested in ("int8", "nf4") else "llama")
    manifest = store.verify(store.base("tiny"), "base")
    adapter = write_adapter(store, model, manifest, seed=1)
    base, tuned, again = asyncio.run(texts(serving, [None, adapter, None]))
    assert base == again != tuned


def test_as_many_rows_as_the_card_has_room_for(tmp_path: Path) -> None:
    store, catalogue = LocalArtifactStore(tmp_path / "artifacts"), tiny_catalogue(write_tiny_model(tmp_path / "model"))
    serving = build_serving(InferenceSettings(context=64), store, catalogue)
    assert serving.slots == MOST_GPU_ROWS
    serving.engine.close()


def test_adapters_are_read_into_page_locked_memory(tiny: Tiny, adapters: list[str], engines: Any) -> None:
    engine = engines("bf16").engine
    weights = read_adapter(tiny.store.adapter(adapters[0]), engine.lora_modules, max_rank=256, dtype=torch.bfloat16)
    assert engine.prepare(weights).buffer.is_pinned()


def test_an_adapter_that_does_not_fit_is_refused_and_the_others_are_served(
    engines: Any, tiny: Tiny, adapters: list[str]
) -> None:
    engine = engines("fp32")
    engine.load(adapters[0])
    lora = engine.runner.lora
    free, _ = torch.cuda.mem_get_info()
    size = sum(fan_in + fan_out for fan_in, fan_out in lora.modules.values())
    rank = free // (size * 4) + 1
    ranks = [len(product.parts) * rank for product in lora._products]
    # Small on the host; only its rows' copies would be too large.
    huge = FusedAdapter(rank, ranks, torch.zeros(0))
    with pytest.raises(Overloaded, match="no memory"):
        engine.engine.load("huge", huge).result(120)
    prompt = engine.prompt(PROMPTS[0])
    heard = engine.submit(prompt, adapter=adapters[0], max_new_tokens=12)
    assert isinstance(heard.last, Finished), heard.last
    assert heard.ids == tiny.oracle.ids(adapters[0], prompt, 12)


def test_an_adapter_loaded_into_peft_on_the_device_says_the_same(engines: Any, tiny: Tiny, adapters: list[str]) -> None:
    """bf16 against bf16, the base and PEFT on the same device: the first tokens, where no rounding has added up."""
    engine = engines("bf16")
    prompt = engine.prompt(PROMPTS[2])
    same = 0
    for adapter in adapters:
        engine.load(adapter)
        heard = engine.submit(prompt, adapter=adapter, max_new_tokens=8)
        assert isinstance(heard.last, Finished)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            base = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.bfloat16).to(CUDA)
            peft = PeftModel.from_pretrained(base, str(tiny.store.adapter(adapter))).eval()
        ids = torch.tensor([prompt], device=CUDA)
        with torch.no_grad():
            said = peft.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=2
            )
        same += said[0, len(prompt) :].tolist()[:1] == heard.ids[:1]
    assert same >= len(adapters) - 1


def test_a_lost_device_fails_every_request_and_is_told(tmp_path: Path) -> None:
    call = [sys.executable, "-m", "tests.services.inference.lose_device", str(tmp_path)]
    done = subprocess.run(call, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False, timeout=80)
    assert done.returncode == 0, done.stderr[-3000:]
