"""What the trainer's tests share: a tiny job in its own artifact store, and a session that records and interrupts."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from services.trainer.contract import EventType, Finished, JobRun, Level, Outcome
from services.trainer.model.bases import WarmBases
from services.trainer.recipe.finetune import finetune
from shared.bases.catalogue import Base, Catalogue
from shared.errors import LeaseLost
from shared.jobs.spec import Hyperparameters, JobSpec, LoraSpec, Phase, Progress
from shared.storage.artifacts import LocalArtifactStore, new_id, sha256_of
from tests.tiny import prepared_tiny

CPU = torch.device("cpu")
Row = dict[str, Any]


def instruction_rows(count: int, *, start: int = 0) -> list[Row]:
    """Rows of ragged lengths, all different."""
    return [
        {"instruction": f"What is {i}?", "output": "It is " + f"{i * 7} and " * (1 + i * i % 7) + "no more."}
        for i in range(start, start + count)
    ]


def ignore() -> None:
    """A check that never stops."""


@dataclass
class Commit:
    step: int
    adapter_id: str
    metrics: dict[str, float]


@dataclass
class RecordingSession:
    """Stands in for the job store: records every call, and can stop, crash or lose the lease on cue.

    Attributes:
        stop: asked between micro-batches, with the number of whole steps reported so far.
        on_commit: called before a commit counts; raise in it to crash.
    """

    stop: Callable[[int], bool] = lambda _steps: False
    on_commit: Callable[[int], None] = lambda _step: None
    phases: list[Phase] = field(default_factory=list)
    steps: list[Progress] = field(default_factory=list)
    events: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    base_loaded: bool | None = None
    lost: bool = False

    def phase(self, phase: Phase) -> None:
        self._guard()
        self.phases.append(phase)

    def progress(self, progress: Progress) -> None:
        self._guard()
        self.steps.append(progress)

    def event(
        self, message: str, *, level: Level = "info", type: EventType = "message", data: dict[str, Any] | None = None
    ) -> None:
        self._guard()
        self.events.append((type, message, data or {}))

    def first_step(self, *, base_loaded: bool) -> None:
        self.base_loaded = base_loaded

    def should_stop(self) -> bool:
        self._guard()
        return self.stop(self.steps[-1].step if self.steps else 0)

    def reserve_adapter(self) -> str:
        self._guard()
        return new_id("adapter")

    def commit_checkpoint(self, *, step: int, adapter_id: str, metrics: dict[str, float]) -> Sequence[str]:
        self._guard()
        self.on_commit(step)
        self.commits.append(Commit(step, adapter_id, metrics))
        return ()

    def series(self) -> list[dict[str, Any]]:
        return [data for kind, _, data in self.events if kind == "metrics"]

    def _guard(self) -> None:
        if self.lost:
            raise LeaseLost("lost")


class TinyJob:
    """One tiny base in one artifact store, and jobs on it."""

    def __init__(self, root: Path) -> None:
        self.store: LocalArtifactStore
        self.base: Base
        self.store, self.base, _ = prepared_tiny(root)
        self.bases = self.fresh_bases()

    def fresh_bases(self) -> WarmBases:
        """As in a worker that was just started."""
        return WarmBases(Catalogue((self.base,)), self.store, CPU)

    def put(self, name: str, rows: Sequence[Row]) -> str:
        """Upload rows as file `file-<name>`."""
        folder = self.store.file(f"file-{name}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "data").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder.name

    def spec(
        self,
        rows: Sequence[Row] | None = None,
        *,
        validation: Sequence[Row] | None = None,
        lora: LoraSpec | None = None,
        hyper: dict[str, Any] | None = None,
        **values: Any,
    ) -> JobSpec:
        """A job on `rows`: `reference` on the tiny model, 11 rows by 4 and 2 epochs = 6 steps unless said otherwise.

        It computes in fp32 on every processor, so that what a test expects does not depend on the machine.
        """
        training = self.put("training", rows if rows is not None else instruction_rows(11))
        files: dict[str, Any] = {
            "training_file": training,
            "training_sha256": sha256_of(self.store.file(training) / "data"),
        }
        if validation is not None:
            held_out = self.put("validation", validation)
            files |= {
                "validation_file": held_out,
                "validation_sha256": sha256_of(self.store.file(held_out) / "data"),
            }
        settings = {"n_epochs": 2, "batch_size": 4, "learning_rate": 1e-2} | (hyper or {})
        return JobSpec(
            base="tiny",
            base_revision=self.base.revision,
            hyperparameters=Hyperparameters(**settings),
            lora=lora or LoraSpec(),
            **files,
            **({"compute_dtype": "fp32"} | values),
        )

    def run(
        self,
        spec: JobSpec,
        session: RecordingSession | None = None,
        *,
        job: str = "ftjob-one",
        token: int = 1,
        candidates: Sequence[Path] = (),
        bases: WarmBases | None = None,
        strict_resume: bool = False,
        ahead: bool | None = None,
    ) -> Outcome:
        run, session = JobRun(job, token, spec), session or RecordingSession()
        return finetune(
            run, bases or self.bases, self.store, session, candidates, strict_resume=strict_resume, ahead=ahead
        )

    def finish(self, spec: JobSpec, session: RecordingSession | None = None, **where: Any) -> Finished:
        outcome = self.run(spec, session, **where)
        assert isinstance(outcome, Finished)
        return outcome


def weights_of(outcome: Finished) -> str:
    """SHA-256 of the final adapter's weights."""
    return outcome.adapter.files["adapter_model.safetensors"].sha256
