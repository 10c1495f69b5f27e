"""What a user calls a job or a model, and the full name it stands for: a suffix, a beginning, `latest`.

Full names and ids are asked of nobody: they work while the gateway restarts, and the API knows no others.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Json = dict[str, Any]
LATEST = "latest"
# Shorter beginnings of bare ids are too easily another's, and `delete` takes names too.
FEWEST_DIGITS = 4
_JOB = re.compile(r"ftjob-[0-9a-f]{24}")
_TAIL = re.compile(r"(.+?)(:ckpt-step-\d+)?", re.DOTALL)
_MODEL = re.compile(r"ft:.+:.+:.*:[0-9a-f]{12}(:ckpt-step-\d+)?|adapter-.+")


class Ambiguous(Exception):
    """A name stands for several.

    Attributes:
        candidates: their full names, newest first.
    """

    def __init__(self, name: str, candidates: Sequence[str]) -> None:
        super().__init__(f"{name!r} is the name of {len(candidates)}: say more of it")
        self.candidates = list(candidates)


class NothingYet(Exception):
    """`latest` of none."""


def job_id(name: str, jobs: Callable[[], Iterable[Json]]) -> str:
    """The id of the job a name stands for; the name itself if there is none, which the server then refuses.

    Args:
        name: an id, its beginning (with or without `ftjob-`), a suffix, the beginning of the model's name, or `latest`.
        jobs: gets all jobs, newest first; called only for what is no full id.

    Raises:
        Ambiguous: several jobs are called so.
        NothingYet: there is no job.
    """
    if _JOB.fullmatch(name):
        return name
    known = [(job["id"], _words(job.get("suffix"), job.get("fine_tuned_model"), job["id"])) for job in jobs()]
    return _resolved(name, known, "job")


def model_name(name: str, models: Callable[[], Iterable[Json]]) -> str:
    """The full name of the model a name stands for; the name itself if there is none, which the server then refuses.

    Args:
        name: a name or its beginning, a suffix, the id of its job or the beginning of that, or `latest` (the newest
            fine-tuned model that is no checkpoint); with `:ckpt-step-N` behind it, that checkpoint.
        models: gets bases, adapters and checkpoints, newest first; called only for what is no full name.

    Raises:
        Ambiguous: several models are called so.
        NothingYet: there is no fine-tuned model.
    """
    if _MODEL.fullmatch(name):
        return name
    found = list(models())
    if any(name == model["id"] for model in found):
        return name
    head, tail = _TAIL.fullmatch(name).groups(default="") if name else ("", "")  # type: ignore[union-attr]
    known: dict[str, tuple[str, ...]] = {}
    for model in found:
        kind = model.get("kind")
        if kind == "adapter" or (tail and kind == "checkpoint"):
            full = model["id"].partition(":ckpt-step-")[0]
            known.setdefault(full, _words(suffix_of(full), full, model.get("job")))
    resolved = _resolved(head, list(known.items()), "fine-tuned model")
    return resolved + tail if resolved in known else name


def _words(suffix: str | None, model: str | None, job: str | None) -> tuple[str, ...]:
    """What something may be called: its suffix whole, then what may be shortened."""
    digits = [job.removeprefix("ftjob-")] if job else []
    return (suffix or "", model or "", job or "", *digits, *([model.rpartition(":")[2]] if model else []))


def suffix_of(full: str) -> str:
    """The suffix in a fine-tuned model's full name; empty if it has none."""
    parts = full.split(":")
    return parts[-2] if len(parts) >= 5 else ""


def _resolved(name: str, known: list[tuple[str, tuple[str, ...]]], what: str) -> str:
    """The one of `known`, newest first, that a name stands for; a whole word goes before a beginning."""
    if name == LATEST:
        if not known:
            raise NothingYet(f"there is no {what} yet; next: tunesmith train FILE")
        return known[0][0]
    if not name:
        return name
    whole = [full for full, words in known if name in words]
    begun = [full for full, words in known if _begins(name, words)] if len(name) >= FEWEST_DIGITS else []
    found = whole or begun
    if len(found) > 1:
        raise Ambiguous(name, found)
    return found[0] if found else name


def _begins(name: str, words: tuple[str, ...]) -> bool:
    return any(word.startswith(name) for word in words[1:])
