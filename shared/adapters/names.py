"""Public names of adapters, in OpenAI's form: `ft:<base>:<project>:<suffix>:<id>`, checkpoints `…:ckpt-step-<n>`."""

import re

PREFIX = "ft:"
_CHECKPOINT = re.compile(r".+:ckpt-step-\d+")
# As the column is.
MAX_CHARACTERS = 255


def adapter_name(*, base: str, project: str, suffix: str | None, job_id: str) -> str:
    """The name of a job's final adapter."""
    return f"{PREFIX}{base}:{project}:{suffix or ''}:{job_id.removeprefix('ftjob-')[:12]}"


def checkpoint_name(final: str, step: int) -> str:
    """The name of the adapter of one checkpoint, from the name of the job's final adapter."""
    return f"{final}:ckpt-step-{step}"


def is_checkpoint_name(name: str) -> bool:
    """Whether a name is a checkpoint's; a client's suffix may be `ckpt-step-1`, too, and does not make it one."""
    return _CHECKPOINT.fullmatch(name) is not None


def may_be_adapter_name(name: str) -> bool:
    """Whether a client's text can be the name or id of an adapter.

    What cannot is not looked up: PostgreSQL refuses NUL with an error.
    """
    return name.isascii() and name.isprintable() and len(name) <= MAX_CHARACTERS
