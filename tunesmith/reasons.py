"""Why a job waits, and what it warns of: what its events say while somebody waits for its end."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from tunesmith.client import ApiError
from tunesmith.output import plain
from tunesmith.progress import FINAL, stage_of
from tunesmith.wait import Watcher

Json = dict[str, Any]
# Seconds between two looks at the events: each is a request.
EVERY = 5.0
NEWEST = 50
# The first event of each job, which tells nothing to the one who has its id.
CREATED = "Created fine-tuning job"


class Reasons:
    """A watcher that shows what another one does, and between it the job's warnings, each once.

    While a job waits or prepares, its other events are shown too: that is where the reason is.

    Args:
        events: gets the job's newest events, newest first; raises ApiError.
        said: warnings that were shown already.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        inner: Watcher,
        events: Callable[[], Iterable[Json]],
        said: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inner = inner
        self._events = events
        self._said = set(said)
        self._seen: set[str] = set()
        self._clock = clock
        self._looked: float | None = None
        self._stage = ""

    def saw(self, job: Json) -> None:
        self._inner.saw(job)
        stage, now = stage_of(job), self._clock()
        if stage == self._stage and self._looked is not None and now - self._looked < EVERY:
            return
        first = self._looked is None
        self._stage, self._looked = stage, now
        idle = job.get("status") in ("queued", "validating_files") or job.get("phase") == "preparing"
        try:
            unseen = [event for event in self._events() if event["id"] not in self._seen]
        except ApiError:
            # The one who polls the job says so if it lasts.
            return
        for age, event in reversed(list(enumerate(unseen))):
            self._seen.add(event["id"])
            # Of what was before the waiting began, only the last event is the reason.
            idle_now = idle and (age == 0 or not first)
            # How it ended is the waiting one's last word.
            if not (job["status"] in FINAL and event.get("level") == "error"):
                self._show(event, idle_now)

    def note(self, text: str) -> None:
        self._inner.note(text)

    def _show(self, event: Json, idle: bool) -> None:
        text = plain(event["message"])
        if event.get("level") not in ("warn", "error"):
            if idle and event.get("type", "message") == "message" and not text.startswith(CREATED):
                self._inner.note(text)
        elif text not in self._said:
            self._said.add(text)
            self._inner.note(f"warning: {text}")
