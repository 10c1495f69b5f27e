"""Resume state: everything the next step depends on, as safetensors and JSON, never pickle.

Owns its contents, how it is published, and when a run may resume from it. A checkpoint is of a whole step; resuming
from it gives, on the same machine and versions, the same bytes as an uninterrupted run; on another machine, sums are
rounded otherwise.
"""

import errno
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.trainer.contract import JobRun, Session
from services.trainer.model.bases import TrainableBase
from services.trainer.recipe.metrics import History
from services.trainer.recipe.rng import RandomState
from services.trainer.recipe.state import TrainingState
from shared.bases.base_model import library_versions
from shared.errors import ArtifactCorrupt, JobFailed, NotFound
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.manifests import Manifest

TENSORS = "state.safetensors"
VALUES = "state.json"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
KEPT_STATES = 2
# What a disk says of bytes that it has lost; anything else may be well again at the next try.
UNREADABLE = frozenset({errno.EIO, errno.EBADMSG})
# What of a run's identity is the machine's and not the job's.
MACHINE = frozenset({"compute dtype", "device", "processor", "threads"})

Identity = dict[str, Any]
"""What must be equal for a resumed run to be the same run: a readable name → a JSON value."""


def write_state(folder: Path, state: TrainingState, identity: Identity) -> None:
    """Write the resume state into a staged folder."""
    tensors = {f"weight.{name}": p.detach() for name, p in state.parameters.items()}
    for name, moments in _adam(state).items():
        tensors |= {f"adam.{key}.{name}": value for key, value in moments.items()}
    tensors |= {f"random.{key}": value for key, value in state.random.tensors().items()}
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, folder / TENSORS)
    values = {
        "identity": identity,
        "history": state.history.as_json(),
        "random": state.random.as_json(),
        "scaler": state.scaler.state_dict() if state.scaler else None,
        "versions": library_versions(),
    }
    (folder / VALUES).write_text(json.dumps(values))


@dataclass(frozen=True, slots=True)
class SavedState:
    """A resume state that was read whole, before anything of a run is changed.

    Attributes:
        weights: parameter name → its values.
        moments: parameter name → Adam's `step`, `exp_avg` and `exp_avg_sq`; none of a parameter never stepped.
        scaler: fp16's loss scale, if there was one.
    """

    identity: Identity
    history: History
    random: RandomState
    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    scaler: dict[str, Any] | None

    def check_form(self, state: TrainingState) -> None:
        """Raises ArtifactCorrupt unless the weights and moments are those of the run's parameters."""
        shapes = {name: parameter.shape for name, parameter in state.parameters.items()}
        if {name: tensor.shape for name, tensor in self.weights.items()} != shapes:
            raise ArtifactCorrupt("it holds other weights than this version trains")
        for name, moments in self.moments.items():
            if set(moments) != set(MOMENTS) or any(moments[key].shape != shapes.get(name) for key in MOMENTS[1:]):
                raise ArtifactCorrupt("it holds another optimizer's state")

    def restore(self, state: TrainingState, device: torch.device) -> None:
        """Put it into a freshly made run, the process's random generators included."""
        with torch.no_grad():
            for name, parameter in state.parameters.items():
                # In place: the optimizer holds these very tensors.
                parameter.copy_(self.weights[name])
        moments = {i: self.moments[name] for i, name in enumerate(state.parameters) if name in self.moments}
        groups = state.optimizer.state_dict()["param_groups"]
        state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if state.scaler and self.scaler:
            state.scaler.load_state_dict(self.scaler)
        state.history, state.random = self.history, self.random
        state.random.restore(device)
        state.saved_step = state.history.step


def read_state(folder: Path) -> SavedState:
    """Read a verified resume state.

    Raises:
        ArtifactCorrupt: it has another form than this version's.
        OSError: the disk does not give it.
    """
    try:
        values: dict[str, Any] = json.loads((folder / VALUES).read_text())
        tensors = load_file(folder / TENSORS, device="cpu")
        moments: dict[str, dict[str, Tensor]] = {}
        for name, tensor in _under("adam.", tensors).items():
            key, _, parameter = name.partition(".")
            moments.setdefault(parameter, {})[key] = tensor
        return SavedState(
            identity=dict(values["identity"]),
            history=History.from_json(values["history"]),
            random=RandomState.from_parts(values["random"], _under("random.", tensors)),
            weights=_under("weight.", tensors),
            moments=moments,
            scaler=values["scaler"],
        )
    except (AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ArtifactCorrupt(f"it has another form than this version's ({type(error).__name__}: {error})") from error


def resume(
    candidates: Sequence[Path],
    store: LocalArtifactStore,
    state: TrainingState,
    identity: Identity,
    session: Session,
    device: torch.device,
    *,
    strict: bool,
) -> Path | None:
    """Continue from the first candidate that can be read and verifies; newest first.

    Args:
        strict: refuse what was begun on a machine that computes otherwise, instead of reporting it.

    Returns:
        The folder continued from; None if there is none, and the run begins at step 0.

    Raises:
        JobFailed: `resume_mismatch`: a candidate belongs to a run that differs from this one.
        OSError: the disk does not answer; what it cannot read (EIO) is passed over.
    """
    for folder in candidates:
        try:
            store.verify(folder, "checkpoint")
            saved = read_state(folder)
            differing = _other_machine(saved, identity, strict=strict)
            saved.check_form(state)
        except (NotFound, ArtifactCorrupt) as error:
            session.event(f"Checkpoint {folder.name} cannot be used: {error.message}", level="warn")
            continue
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
            session.event(f"Checkpoint {folder.name} cannot be used: the disk cannot read it ({error})", level="warn")
            continue
        if differing:
            session.event(
                f"This worker computes otherwise than the one before, {differing}: the adapter may differ in its last "
                "bits from that of an uninterrupted run",
                level="warn",
            )
        saved.restore(state, device)
        step = state.history.step
        session.event(f"Resumed from the checkpoint at step {step}", data={"resumed_step": step})
        return folder
    if candidates:
        session.event("No checkpoint can be used; training starts again", level="warn")
    return None


def publish_state(
    store: LocalArtifactStore, job: JobRun, base: TrainableBase, template: str, state: TrainingState, identity: Identity
) -> Path:
    """Publish the resume state of the last whole step; it is used only once the session has committed it."""
    target = store.checkpoint(job.job_id, job.lease_token, state.history.step)
    manifest = Manifest(
        kind="checkpoint",
        id=job.job_id,
        job=job.job_id,
        step=state.history.step,
        base=base.loaded.base.id,
        base_revision=base.loaded.base.revision,
        base_sha256=base.loaded.sha256,
        precision=base.loaded.precision,
        template=template,
        data_sha256=job.spec.data_sha256,
        versions=library_versions(),
        files={},
    )
    with store.staged() as folder:
        write_state(folder, state, identity)
        store.publish(folder, target, manifest)
    return target


def prune(store: LocalArtifactStore, known: list[Path]) -> None:
    """Remove all but the two newest of the committed resume states this run knows of, oldest first in `known`.

    Only those: a folder we know nothing of may belong to a worker that took the job over.
    """
    while len(known) > KEPT_STATES:
        store.remove(known.pop(0))


def _adam(state: TrainingState) -> dict[str, dict[str, Tensor]]:
    moments = state.optimizer.state_dict()["state"]
    return {name: moments[index] for index, name in enumerate(state.parameters) if index in moments}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _other_machine(saved: SavedState, now: Identity, *, strict: bool) -> str:
    """How the machine that wrote a checkpoint computed otherwise than this one; empty if it did not.

    Raises:
        JobFailed: `resume_mismatch`: more differs than the machine, or that is not allowed.
    """
    then = saved.identity
    # A machine's property that an older version has not written down is not known to differ.
    names = [name for name in {**then, **now} if name in then or name not in MACHINE]
    differing = {
        name: f"{name} ({then.get(name)} then, {now.get(name)} now)"
        for name in names
        if then.get(name) != now.get(name)
    }
    # How rows are laid out in micro-batches follows from the device.
    machine = MACHINE | {"layout"} if "device" in differing else MACHINE
    if differing and (strict or not machine.issuperset(differing)):
        raise JobFailed(
            f"the checkpoint at step {saved.history.step} cannot be continued exactly, these differ: "
            f"{'; '.join(differing.values())}; create a new job, or restore what it began with",
            code="resume_mismatch",
        )
    return "; ".join(differing.values())
