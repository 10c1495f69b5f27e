"""The trainers that `benchmarks.train` compares, each in a process of its own that runs a few steps when told to.

All train the same rows in the same order on the same base with the same LoRA shape; the settings that differ are each
trainer's own and are reported. TRL is not a dependency: it is looked for in `.venv-bench` (`make bench-train`).
"""

import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from services.trainer.contract import EventType, Finished, JobRun, Level
from services.trainer.model.bases import WarmBases
from services.trainer.model.lora import lora_config
from services.trainer.recipe.finetune import finetune
from services.trainer.recipe.metrics import peak_memory_mb, reset_peak_memory
from shared.bases.base_model import quantization_config, quiet_libraries
from shared.bases.catalogue import Base, Catalogue
from shared.jobs.spec import BasePrecision, JobSpec, Phase, Progress
from shared.logs import configure_logging
from shared.storage.artifacts import LocalArtifactStore, new_id

TRL_FOLDER = Path(__file__).parents[1] / ".venv-bench"
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Task:
    """The input of every peer.

    Attributes:
        rows: JSON file of [ids, supervised] in training order.
        base: folder of the base model; `store` is the artifact store it lies in.
        max_steps: of the whole run; the learning rate falls to 0 over them.
    """

    store: Path
    catalogue_base: Base
    rows: Path
    spec: JobSpec
    max_steps: int
    steps_per_round: int
    threads: int
    out: Path

    @property
    def base(self) -> Path:
        return LocalArtifactStore(self.store).base(self.catalogue_base.id)


@dataclass(slots=True)
class Round:
    """Seconds of some steps, and what they computed on: real tokens, and slots with the padding among them."""

    seconds: float = 0.0
    tokens: int = 0
    slots: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """A peer's report at its end.

    Attributes:
        adapter: folder of its adapter, in peft's format.
        startup: seconds from a job's start to its first step, of the first and of later jobs (ours only).
    """

    adapter: str
    peak_memory_mb: float
    settings: dict[str, Any]
    startup: list[float]


class Counter(Protocol):
    """What `counting` reports to."""

    def open(self) -> None:
        """Training begins."""

    def computed(self, tokens: int, slots: int) -> None:
        """So many real tokens were computed on, and so many places with the padding among them."""

    def step_done(self) -> None:
        """An optimizer step has ended."""


class Gate:
    """Lets a trainer run so many steps, reports how long they took, and waits."""

    def __init__(self, pipe: Connection, steps: int) -> None:
        self._pipe = pipe
        self._steps = steps
        self._done = 0
        self._round = Round()
        self._started = 0.0

    def open(self) -> None:
        """Wait for the first round; its peak of memory is counted from here."""
        self._pipe.send("ready")
        self._pipe.recv()
        reset_peak_memory(CPU)
        self._started = time.perf_counter()

    def computed(self, tokens: int, slots: int) -> None:
        self._round.tokens += tokens
        self._round.slots += slots

    def step_done(self) -> None:
        self._done += 1
        if self._done % self._steps == 0:
            self._round.seconds = time.perf_counter() - self._started
            self._pipe.send(self._round)
            self._pipe.recv()
            self._round = Round()
            self._started = time.perf_counter()


def run_peer(name: str, task: Task, pipe: Connection) -> None:
    """Run a peer: the entry point of its process."""
    warnings.simplefilter("ignore")
    quiet_libraries()
    configure_logging("bench", "WARNING")
    torch.set_num_threads(task.threads)
    pipe.send(PEERS[name](task, Gate(pipe, task.steps_per_round)))


def _ours(precision: BasePrecision) -> Callable[[Task, Gate], Report]:
    def train(task: Task, gate: Gate) -> Report:
        store = LocalArtifactStore(task.store)
        bases = WarmBases(Catalogue((task.catalogue_base,)), store, CPU)
        spec = task.spec.model_copy(update={"base_precision": precision})
        started = time.perf_counter()
        session = GateSession(gate, _tokens_of_steps(task))
        outcome = finetune(JobRun(new_id("ftjob"), 1, spec), bases, store, session)
        assert isinstance(outcome, Finished)
        peak = peak_memory_mb(CPU)
        startup = [session.training_since - started]
        for _ in range(5):
            session = GateSession(None, [])
            started = time.perf_counter()
            finetune(JobRun(new_id("ftjob"), 1, spec), bases, store, session)
            startup.append(session.training_since - started)
        settings = {"base": precision, "layout": "packed by first fit, at most 1,024 tokens a micro-batch"}
        return Report(str(store.adapter(outcome.adapter_id)), peak, settings, startup)

    return train


def _tokens_of_steps(task: Task) -> list[int]:
    lengths = [len(ids) for ids, _ in json.loads(task.rows.read_text())]
    size = task.spec.hyperparameters.batch_size
    return [sum(lengths[start : start + size]) for start in range(0, len(lengths), size)]


class SilentSession:
    """A session that records nothing and never asks the recipe to stop."""

    def phase(self, phase: Phase) -> None: ...

    def progress(self, progress: Progress) -> None: ...

    def event(
        self, message: str, *, level: Level = "info", type: EventType = "message", data: dict[str, Any] | None = None
    ) -> None: ...

    def first_step(self, *, base_loaded: bool) -> None: ...

    def should_stop(self) -> bool:
        return False

    def reserve_adapter(self) -> str:
        return new_id("adapter")

    def commit_checkpoint(self, *, step: int, adapter_id: str, metrics: dict[str, float]) -> Sequence[str]:
        return ()


class GateSession(SilentSession):
    """A silent session with a gate; without a gate it stops before the first step."""

    def __init__(self, gate: Gate | None, tokens_of_steps: list[int]) -> None:
        self._gate = gate
        self._tokens_of_steps = tokens_of_steps
        self.training_since = 0.0

    def phase(self, phase: Phase) -> None:
        if phase is Phase.TRAINING and not self.training_since:
            self.training_since = time.perf_counter()
            if self._gate:
                self._gate.open()

    def progress(self, progress: Progress) -> None:
        assert self._gate
        tokens = self._tokens_of_steps[progress.step - 1]
        self._gate.computed(tokens, tokens)
        self._gate.step_done()

    def should_stop(self) -> bool:
        return self._gate is None and self.training_since > 0


def counting(trainer_class: Any, gate: Counter) -> Any:
    """A trainer that tells the gate what it computes on and when a step is done, and the callback that it needs."""
    base = importlib.import_module("transformers").TrainerCallback

    class Counting(trainer_class):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            slots = inputs["input_ids"].numel()
            gate.computed(slots if mask is None else int(mask.sum()), slots)
            return super().training_step(model, inputs, *args, **kwargs)

    class Callback(base):  # type: ignore[misc, valid-type]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            gate.open()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate.step_done()

    return Counting, Callback()


def _base_and_lora(task: Task, precision: BasePrecision) -> tuple[Any, Any]:
    transformers = importlib.import_module("transformers")
    peft = importlib.import_module("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        task.base, dtype=torch.float32, quantization_config=quantization_config(precision, torch.float32)
    )
    if precision == "int8":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    transformers.set_seed(task.spec.seed)
    return model, lora_config(task.spec.lora)


def _arguments(task: Task, **own: Any) -> dict[str, Any]:
    hyper = task.spec.hyperparameters
    same = {
        "output_dir": str(task.out / "trainer"),
        "learning_rate": hyper.learning_rate,
        "lr_scheduler_type": hyper.scheduler,
        "weight_decay": hyper.weight_decay,
        "max_grad_norm": hyper.max_grad_norm,
        "max_steps": task.max_steps,
        "seed": task.spec.seed,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    return same | own


def _finish(trainer: Any, task: Task, name: str, settings: dict[str, Any]) -> Report:
    trainer.train()
    peak = peak_memory_mb(CPU)
    adapter = task.out / name
    trainer.model.save_pretrained(adapter)
    return Report(str(adapter), peak, settings, [])


def _tutorial(precision: BasePrecision) -> Callable[[Task, Gate], Report]:
    """The tutorial's recipe with the labels it forgot: rows padded to 512, 2 x 4, transformers' Trainer."""

    def train(task: Task, gate: Gate) -> Report:
        transformers, peft = importlib.import_module("transformers"), importlib.import_module("peft")
        model, lora = _base_and_lora(task, precision)
        model = peft.get_peft_model(model, lora)
        length = task.spec.hyperparameters.max_length
        rows = [_padded(ids, supervised, length) for ids, supervised in json.loads(task.rows.read_text())]
        own = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
        cls, callback = counting(transformers.Trainer, gate)
        arguments = transformers.TrainingArguments(**_arguments(task, **own))
        trainer = cls(model=model, args=arguments, train_dataset=rows, callbacks=[callback])
        settings = own | {"base": precision, "padding": f"every row to {length}"}
        return _finish(trainer, task, f"tutorial-{precision}", settings)

    return train


def _padded(ids: list[int], supervised: list[bool], length: int) -> dict[str, list[int]]:
    pad = length - len(ids)
    return {
        "input_ids": ids + [0] * pad,
        "attention_mask": [1] * len(ids) + [0] * pad,
        "labels": [i if s else -100 for i, s in zip(ids, supervised, strict=True)] + [-100] * pad,
    }


def _trl(*, packed: bool) -> Callable[[Task, Gate], Report]:
    def train(task: Task, gate: Gate) -> Report:
        sys.path.append(str(TRL_FOLDER))
        trl, datasets = importlib.import_module("trl"), importlib.import_module("datasets")
        model, lora = _base_and_lora(task, "fp32")
        rows = json.loads(task.rows.read_text())
        dataset = datasets.Dataset.from_list([{"input_ids": i, "completion_mask": list(map(int, s))} for i, s in rows])
        own: dict[str, Any] = {"max_length": task.spec.hyperparameters.max_length, "completion_only_loss": True}
        own |= {"gradient_checkpointing": False, "gradient_accumulation_steps": 1}
        if packed:
            own |= {"packing": True, "packing_strategy": "bfd", "per_device_train_batch_size": 1}
        else:
            own |= {"per_device_train_batch_size": task.spec.hyperparameters.batch_size}
        cls, callback = counting(trl.SFTTrainer, gate)
        tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(task.base)
        trainer = cls(
            model=model,
            args=trl.SFTConfig(**_arguments(task, **own)),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[callback],
        )
        settings = own | {"base": "fp32", "trl": trl.__version__}
        return _finish(trainer, task, "trl-packed" if packed else "trl-padded", settings)

    return train


PEERS: dict[str, Callable[[Task, Gate], Report]] = {
    "tutorial_fp32": _tutorial("fp32"),
    "tutorial_int8": _tutorial("int8"),
    "trl_padded": _trl(packed=False),
    "trl_packed": _trl(packed=True),
    "ours_fp32": _ours("fp32"),
    "ours_int8": _ours("int8"),
}
