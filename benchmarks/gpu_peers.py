"""Other trainers for `benchmarks.gpu`: TRL and Unsloth, where they are installed, each in a process of its own.

A process, because Unsloth changes transformers as it is imported. Both train packed rows in bf16 through TRL's
`SFTTrainer` with its own settings. TRL is looked for in `.venv-bench` too (`make .venv-bench/ready`).
"""

import importlib
import importlib.util
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_peers import TRL_FOLDER, counting
from services.trainer.model.forward import Sample
from services.trainer.model.lora import lora_config
from shared.bases.base_model import quiet_libraries
from shared.jobs.spec import PRESETS

WARM_UP, ROUNDS, STEPS, BATCH = 2, 3, 8, 8


@dataclass(slots=True)
class Stopwatch:
    """Real tokens per second of each round of steps, after some that warm up."""

    device: torch.device
    rates: list[float] = field(default_factory=list)
    _steps: int = 0
    _tokens: int = 0
    _started: float = 0.0

    def open(self) -> None:
        """Training begins."""

    def computed(self, tokens: int, slots: int) -> None:
        self._tokens += tokens

    def step_done(self) -> None:
        self._steps += 1
        timed = self._steps - WARM_UP
        if timed < 0 or timed % STEPS:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if timed:
            self.rates.append(self._tokens / (now - self._started))
        self._tokens, self._started = 0, now


def installed(peer: str) -> bool:
    """Whether a peer, `trl` or `unsloth`, can be imported."""
    _find_trl()
    return all(importlib.util.find_spec(name) is not None for name in {peer, "trl"})


def measure(peer: str, rows: Sequence[Sample], device: torch.device, folder: Path, length: int) -> dict[str, Any]:
    """Tokens per second and memory of a peer, or why it did not run.

    Args:
        folder: the base, without a tokenizer.
        length: tokens of a packed row.
    """
    if not installed(peer):
        return {"not_run": f"{peer} is not installed"}
    here, there = multiprocessing.get_context("spawn").Pipe()
    arguments = (peer, [(ids.tolist(), supervised.tolist()) for ids, supervised in rows], device, folder, length, there)
    process = multiprocessing.get_context("spawn").Process(target=_run, args=arguments)
    process.start()
    there.close()
    try:
        found: dict[str, Any] = here.recv()
    except EOFError:
        process.join()
        return {"not_run": f"{peer} ended with {process.exitcode}"}
    process.join()
    return found


def _run(peer: str, rows: list[Any], device: torch.device, folder: Path, length: int, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    quiet_libraries()
    _find_trl()
    watch = Stopwatch(device)
    # First, because of what it changes.
    unsloth = importlib.import_module("unsloth") if peer == "unsloth" else None
    with tempfile.TemporaryDirectory() as out:
        trainer = _trainer(rows, device, folder, length, Path(out), watch, unsloth)
        trainer.train()
    memory = {"peak_reserved_mb": round(torch.cuda.max_memory_reserved() / 1e6)} if device.type == "cuda" else {}
    rates = watch.rates
    version = importlib.import_module(peer).__version__
    pipe.send(
        {
            "tokens_per_second": round(statistics.median(rates), 1),
            "rounds": [round(rate, 1) for rate in rates],
            "version": version,
        }
        | memory
    )


def _trainer(
    rows: list[Any], device: torch.device, folder: Path, length: int, out: Path, watch: Stopwatch, unsloth: Any
) -> Any:
    trl, datasets = importlib.import_module("trl"), importlib.import_module("datasets")
    lora = lora_config(PRESETS["reference"].lora)
    steps = WARM_UP + ROUNDS * STEPS
    # So many packed rows that no epoch ends in between: each is at most `length` long.
    dataset = datasets.Dataset.from_list([{"input_ids": i, "completion_mask": list(map(int, s))} for i, s in rows])
    settings = trl.SFTConfig(
        output_dir=str(out),
        max_length=length,
        completion_only_loss=True,
        packing=True,
        packing_strategy="bfd",
        per_device_train_batch_size=BATCH,
        gradient_checkpointing=False,
        max_steps=steps,
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=42,
    )
    if unsloth is not None:
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            str(folder), max_seq_length=length, dtype=torch.bfloat16, load_in_4bit=False
        )
        model = unsloth.FastLanguageModel.get_peft_model(
            model,
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            target_modules=sorted(lora.target_modules),
            lora_dropout=0,
            bias="none",
            use_gradient_checkpointing=False,
            random_state=42,
        )
        adapted: dict[str, Any] = {"model": model}
    else:
        transformers = importlib.import_module("transformers")
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": device})
        adapted = {"model": base, "peft_config": lora}
    cls, callback = counting(trl.SFTTrainer, watch)
    return cls(args=settings, train_dataset=dataset, processing_class=_tokenizer(), callbacks=[callback], **adapted)


def _tokenizer() -> Any:
    """One that the trainer can ask for its padding and its end; the rows are numbers already."""
    tokenizers, transformers = importlib.import_module("tokenizers"), importlib.import_module("transformers")
    words = tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )


def _find_trl() -> None:
    if str(TRL_FOLDER) not in sys.path:
        sys.path.append(str(TRL_FOLDER))
