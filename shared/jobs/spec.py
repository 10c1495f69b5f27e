"""The vocabulary of a job: its specification, its states and the legal moves between them.

Knows no SQL, no HTTP and no torch. The client's request, before it is resolved, belongs to the gateway.
"""

import hashlib
from enum import StrEnum
from typing import Literal

from pydantic import Field

from shared.frozen import Frozen, ModuleName


class State(StrEnum):
    """Where a job is; one column, closed."""

    VALIDATING = "validating"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return not TRANSITIONS[self]

    @property
    def leased(self) -> bool:
        """True while a worker holds the job."""
        return self in LEASED

    @property
    def status(self) -> str:
        """The public status: OpenAI's closed enum has no word for pausing, paused or cancelling."""
        return _STATUS.get(self, self.value)


_STATUS = {
    State.VALIDATING: "validating_files",
    State.PAUSING: "running",
    State.CANCELLING: "running",
    State.PAUSED: "queued",
}

TRANSITIONS: dict[State, frozenset[State]] = {
    State.VALIDATING: frozenset({State.QUEUED, State.FAILED, State.CANCELLED}),
    State.QUEUED: frozenset({State.RUNNING, State.PAUSED, State.CANCELLED}),
    State.RUNNING: frozenset({State.SUCCEEDED, State.FAILED, State.QUEUED, State.PAUSING, State.CANCELLING}),
    # A request can come too late: the job ends first. If the worker is lost, the request is carried out without it.
    State.PAUSING: frozenset({State.PAUSED, State.SUCCEEDED, State.FAILED, State.CANCELLING}),
    State.CANCELLING: frozenset({State.CANCELLED, State.SUCCEEDED, State.FAILED}),
    State.PAUSED: frozenset({State.QUEUED, State.CANCELLED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}

LEASED = frozenset({State.RUNNING, State.PAUSING, State.CANCELLING})
UNFINISHED = frozenset(state for state in State if not state.final)


def may_become(state: State) -> list[State]:
    """The states a job may be in to move to `state`: the condition of the UPDATE that moves it."""
    return [source for source, targets in TRANSITIONS.items() if state in targets]


class Phase(StrEnum):
    """What a running job is doing."""

    PREPARING = "preparing"
    TRAINING = "training"
    EVALUATING = "evaluating"
    SAVING = "saving"


class RequestedAction(StrEnum):
    """What the owner of a job wants its worker to do, read with every renewal."""

    NONE = "none"
    PAUSE = "pause"
    CANCEL = "cancel"


# As many as OpenAI keeps.
DEFAULT_KEEP_CHECKPOINTS = 3
MIN_LENGTH, MAX_LENGTH = 8, 32_768
MAX_TRAINING_FILES = 16

BasePrecision = Literal["int8", "nf4", "bf16", "fp16", "fp32"]
ComputeDtype = Literal["auto", "bf16", "fp16", "fp32"]
DeviceKind = Literal["cpu", "cuda"]
Scheduler = Literal["linear", "cosine", "constant"]
Truncation = Literal["cut_end", "cut_start", "drop_row"]


class LoraSpec(Frozen):
    """LoRA's shape (Hu et al. 2021); `use_rslora` scales by alpha/sqrt(r) instead of alpha/r."""

    r: int = Field(8, ge=1, le=256)
    alpha: float = Field(32, gt=0, le=4096)
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: tuple[ModuleName, ...] = Field(("q_proj", "v_proj"), min_length=1, max_length=16)
    use_rslora: bool = False


class Hyperparameters(Frozen):
    """Everything effective about one run of the recipe; units in the names or below.

    Attributes:
        batch_size: examples per optimizer step, exactly; their layout in micro-batches is not part of this.
        max_length: tokens of one example.
        truncation: of an example that is longer the end is cut, or the start (the end of the answer is learnt then), or
            it is dropped; text is never cut, but divided.
        max_steps: optimizer steps; ends the run before its epochs do.
        warmup_ratio: share of all steps during which the learning rate rises from 0.
        checkpoint_steps: a checkpoint every so many steps, besides one per epoch.
        metrics_steps: a metrics event every so many steps.
        validation_split: share of the training rows to hold out when there is no validation file; 0 holds out none.
        early_stopping_patience: ends the run once so many checkpoints in a row have not lowered the validation loss.
    """

    n_epochs: int = Field(3, ge=1, le=50)
    batch_size: int = Field(8, ge=1, le=256)
    learning_rate: float = Field(2e-4, gt=0, le=1)
    max_length: int = Field(512, ge=MIN_LENGTH, le=MAX_LENGTH)
    max_steps: int | None = Field(None, ge=1, le=10_000_000)
    warmup_ratio: float = Field(0, ge=0, lt=1)
    scheduler: Scheduler = "linear"
    weight_decay: float = Field(0, ge=0, le=1)
    max_grad_norm: float = Field(1.0, gt=0, le=1e6)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0, le=1)
    train_on_prompt: bool = False
    checkpoint_steps: int | None = Field(None, ge=1, le=10_000_000)
    metrics_steps: int = Field(5, ge=1, le=10_000)
    validation_split: float = Field(0, ge=0, le=0.5)
    early_stopping_patience: int | None = Field(None, ge=1, le=100)
    truncation: Truncation = "cut_end"


class TrainingFile(Frozen):
    """A file that is trained on: its id, and the hash of the bytes that were uploaded."""

    id: str
    sha256: str


class JobSpec(Frozen):
    """What a worker is to do, complete: nothing is looked up elsewhere but the base and the files named here.

    `training_file` and `validation_file` are file ids; `training_sha256` is the uploaded file's hash, so that a resumed
    job can tell that it trains on the same rows. `further_training_files` follow the first, as if all were one file.
    `initial_adapter` is the id of the adapter to continue from.
    `keep_checkpoints` is how many of the newest stay, beside the best: of two, the older is what training falls back to
    when a disk cannot read the newer.
    """

    base: str
    base_revision: str
    training_file: str
    training_sha256: str
    validation_file: str | None = None
    validation_sha256: str | None = None
    suffix: str | None = None
    seed: int = Field(42, ge=0, le=2**31 - 1)
    preset: Literal["reference", "recommended"] = "reference"
    hyperparameters: Hyperparameters = Hyperparameters()
    lora: LoraSpec = LoraSpec()
    base_precision: BasePrecision = "int8"
    compute_dtype: ComputeDtype = "auto"
    initial_adapter: str | None = None
    keep_checkpoints: int = Field(DEFAULT_KEEP_CHECKPOINTS, ge=2, le=1000)
    further_training_files: tuple[TrainingFile, ...] = Field((), max_length=MAX_TRAINING_FILES - 1)

    @property
    def training_files(self) -> tuple[TrainingFile, ...]:
        """All of them, in the order in which their rows are taken."""
        return TrainingFile(id=self.training_file, sha256=self.training_sha256), *self.further_training_files

    @property
    def data_sha256(self) -> str:
        """The training file's hash; of several, the hash of theirs, a line each."""
        if not self.further_training_files:
            return self.training_sha256
        return hashlib.sha256("\n".join(file.sha256 for file in self.training_files).encode()).hexdigest()


class Preset(Frozen):
    """Where unsaid values come from.

    Attributes:
        by_rows: epochs and batch size come from the number of rows (`shared.training.automatic`).
    """

    hyperparameters: Hyperparameters
    lora: LoraSpec
    by_rows: bool = False


PRESETS: dict[str, Preset] = {
    # The tutorial's recipe, completed by the defaults HF's Trainer had for what it left out.
    "reference": Preset(hyperparameters=Hyperparameters(), lora=LoraSpec()),
    # All linear layers: held-out loss falls twice as far in the same time as with q and v alone. The learning rate
    # comes from a search over rates, see docs/training-notes.md.
    "recommended": Preset(
        hyperparameters=Hyperparameters(learning_rate=8e-4, warmup_ratio=0.03, scheduler="cosine"),
        lora=LoraSpec(
            r=16,
            alpha=32,
            dropout=0,
            target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ),
        by_rows=True,
    ),
}


class Progress(Frozen):
    """How far a job is; `queue_position` is filled in by the reader, the rest by the worker.

    Attributes:
        eta_seconds: left from `written_at` on, which is epoch seconds by the worker's clock, for people to read.
    """

    step: int = 0
    total_steps: int | None = None
    epoch: float = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    written_at: float | None = None
    queue_position: int | None = None


class JobFault(Frozen):
    """Why a job failed, in OpenAI's shape."""

    code: str
    message: str
    param: str | None = None


class TrainingReport(Frozen):
    """What was really trained; stored on the job when it ends.

    Attributes:
        dropped_rows: rows of the training file of which nothing was learnt, within `max_length`.
        truncated_rows: rows of which a part was cut; they are among `rows`.
        trained_tokens: supervised tokens seen, over all epochs.
        tokens_per_second: real (non-pad) tokens per second of training time, evaluation and saving excluded.
        mfu: model FLOP utilisation against a measured sgemm peak; None if the peak was not measured.
        tokens_at_once: tokens of the largest micro-batch of the last claim, which its peak of memory depends on.
        device: what the last claim computed on; None in the reports of versions that did not say.
        peak_memory_mb: peak resident memory of the worker (CPU) or of the allocator (CUDA), in MB of 10^6 bytes.
        quantized_layers: how many linear layers bitsandbytes holds (0 unless int8 or nf4).
        base_mb: bytes of the frozen base as it lies in memory, in MB of 10^6 bytes.
        best_step: the step of the lowest validation loss; its checkpoint can be served as it is.
        stopped_early: the validation loss had not fallen for `early_stopping_patience` checkpoints.
    """

    trainable_params: int
    total_params: int
    trained_tokens: int
    total_tokens: int
    steps: int
    rows: int
    dropped_rows: int
    truncated_rows: int = 0
    train_loss: float
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    best_step: int | None = None
    best_eval_loss: float | None = None
    stopped_early: bool = False
    tokens_per_second: float
    mfu_formula: str = "4N FLOP per token"
    mfu: float | None = None
    device: DeviceKind | None = None
    peak_memory_mb: float
    tokens_at_once: int | None = None
    grad_norm: float
    quantized_layers: int
    base_mb: float
