"""Resume state: everything the next step depends on, as safetensors and JSON, never pickle.

Owns its contents, how it is published, and when a run may resume from it. A checkpoint is of a whole step; resuming
from it gives, on the same machine and versions, the same bytes as an uninterrupted run.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.trainer.contract import JobRun, Session
from services.trainer.model.bases import TrainableBase
from services.trainer.recipe.metrics import History
from services.trainer.recipe.rng import RandomState
from services.trainer.recipe.state import TrainingState
from shared.bases.base_model import library_versions
from shared.errors import ArtifactCorrupt, JobFailed, NotFound
from shared.storage.artifacts import LocalArtifactStore, Manifest

TENSORS = "state.safetensors"
VALUES = "state.json"
KEPT_STATES = 2

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


def read_state(folder: Path, state: TrainingState, identity: Identity, device: torch.device) -> None:
    """Restore a verified resume state into a freshly made run, the process's random generators included.

    Raises:
        JobFailed: `resume_mismatch`: it belongs to a run that differs from this one.
    """
    values: dict[str, Any] = json.loads((folder / VALUES).read_text())
    _check_identity(values["identity"], identity, values["history"]["step"])
    tensors = load_file(folder / TENSORS, device="cpu")
    with torch.no_grad():
        for name, parameter in state.parameters.items():
            # In place: the optimizer holds these very tensors.
            parameter.copy_(tensors[f"weight.{name}"])
    moments = {
        index: {
            key: tensors[f"adam.{key}.{name}"]
            for key in ("step", "exp_avg", "exp_avg_sq")
            if f"adam.{key}.{name}" in tensors
        }
        for index, name in enumerate(state.parameters)
    }
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": {i: m for i, m in moments.items() if m}, "param_groups": groups})
    if state.scaler and values["scaler"]:
        state.scaler.load_state_dict(values["scaler"])
    state.history = History.from_json(values["history"])
    random_tensors = {key.removeprefix("random."): t for key, t in tensors.items() if key.startswith("random.")}
    state.random = RandomState.from_parts(values["random"], random_tensors)
    state.random.restore(device)
    state.saved_step = state.history.step


def resume(
    candidates: Sequence[Path],
    store: LocalArtifactStore,
    state: TrainingState,
    identity: Identity,
    session: Session,
    device: torch.device,
) -> Path | None:
    """Continue from the first candidate that verifies; newest first.

    Returns:
        The folder continued from; None if there is none, and the run begins at step 0.

    Raises:
        JobFailed: see `read_state`.
    """
    for folder in candidates:
        try:
            store.verify(folder, "checkpoint")
        except (NotFound, ArtifactCorrupt) as error:
            session.event(f"Checkpoint {folder.name} cannot be used: {error.message}", level="warn")
            continue
        read_state(folder, state, identity, device)
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
        data_sha256=job.spec.training_sha256,
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


def _check_identity(saved: Identity, now: Identity, step: int) -> None:
    differing = [
        f"{name} ({saved.get(name)} then, {now.get(name)} now)"
        for name in {**saved, **now}
        if saved.get(name) != now.get(name)
    ]
    if differing:
        raise JobFailed(
            f"the checkpoint at step {step} cannot be continued exactly, these differ: {'; '.join(differing)}; "
            "create a new job, or restore what it began with",
            code="resume_mismatch",
        )
