"""How a job's progress is shown: a bar on a terminal, plain lines elsewhere. Writes to stderr only."""

import time
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from tunesmith.layout import message, width_of

Json = dict[str, Any]
LINE_EVERY_SECONDS = 5.0
FINAL = ("succeeded", "failed", "cancelled")


class Lines:
    """One line when the state or phase changes, and every few seconds while steps go on.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._stage = ""
        self._text = ""
        self._written = 0.0

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        return

    def saw(self, job: Json) -> None:
        if job["status"] in FINAL:
            # The caller reports how it ended.
            return
        stage, text = stage_of(job), " ".join([stage_of(job), *figures(job)])
        stale = self._clock() - self._written >= LINE_EVERY_SECONDS
        if stage != self._stage or (text != self._text and stale):
            self._stage, self._text, self._written = stage, text, self._clock()
            self.note(text)

    def note(self, text: str) -> None:
        print(message(text, width_of(self._out)), file=self._out, flush=True)


class Bar:
    """A live bar with step, loss, speed and remaining time."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[more]}"),
        )
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("waiting", total=None, more="")

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def saw(self, job: Json) -> None:
        progress = job.get("progress") or {}
        self._progress.update(
            self._task,
            description=stage_of(job),
            completed=progress.get("step") or 0,
            total=progress.get("total_steps"),
            more=" ".join(figures(job)[1:]),
        )

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)


def watcher_for(out: TextIO) -> Lines | Bar:
    """A bar if `out` is a terminal that can redraw, else lines."""
    console = Console(file=out)
    return Bar(console) if console.is_terminal and not console.is_dumb_terminal else Lines(out)


def stage_of(job: Json) -> str:
    """State and phase in words; `state` is Tunesmith's, `status` OpenAI's coarser one."""
    state = job.get("state") or job["status"]
    position = (job.get("progress") or {}).get("queue_position")
    if state == "queued" and position:
        return f"queued (position {position})"
    return f"{state} {job['phase']}" if state == "running" and job.get("phase") else str(state)


def figures(job: Json) -> list[str]:
    """Step, loss, speed and remaining time, those that are known; the step comes first."""
    progress = job.get("progress") or {}
    total = progress.get("total_steps")
    if not total:
        return []
    texts = [f"{progress.get('step') or 0}/{total}"]
    if job["status"] != "running":
        # The last speed of a job that waits is out of date.
        return texts
    for key, form in (("loss", "loss {:.3f}"), ("tokens_per_second", "{:.0f} tokens/s")):
        if progress.get(key) is not None:
            texts.append(form.format(progress[key]))
    if progress.get("eta_seconds") is not None:
        texts.append(f"ETA {duration(progress['eta_seconds'])}")
    return texts


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
