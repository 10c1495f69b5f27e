"""Public names of adapters, in OpenAI's form: `ft:<base>:<project>:<suffix>:<id>`, checkpoints `…:ckpt-step-<n>`."""

PREFIX = "ft:"
_CHECKPOINT = ":ckpt-step-"
# As the column is.
MAX_CHARACTERS = 255


def adapter_name(*, base: str, project: str, suffix: str | None, job_id: str) -> str:
    """The name of a job's final adapter."""
    return f"{PREFIX}{base}:{project}:{suffix or ''}:{job_id.removeprefix('ftjob-')[:12]}"


def checkpoint_name(final: str, step: int) -> str:
    """The name of the adapter of one checkpoint, from the name of the job's final adapter."""
    return f"{final}{_CHECKPOINT}{step}"


def is_checkpoint_name(name: str) -> bool:
    return _CHECKPOINT in name


def may_be_adapter_name(name: str) -> bool:
    """Whether a client's text can be the name or id of an adapter.

    What cannot is not looked up: PostgreSQL refuses NUL with an error.
    """
    return name.isascii() and name.isprintable() and len(name) <= MAX_CHARACTERS
