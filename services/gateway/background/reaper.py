"""Finds jobs whose worker no longer renews its lease.

Runs in every gateway; all it does is idempotent. Knows nothing of Redis: a silent one must not make its looks late.
"""

import time
from collections.abc import Callable

from services.gateway.background.periodic import Periodic
from shared.jobs.heartbeats import Heartbeat, Heartbeats
from shared.logs import get_logger

LEASE_SECONDS = 15.0
TICK_SECONDS = 1.0
# A look that comes later than this after the last one says nothing about workers: this process, or the database, stood.
LATE_SECONDS = 3.0


class Reaper:
    """Watches heartbeats on a monotonic clock of its own; no clock is compared with a worker's.

    Args:
        notify: called for each job that was taken; returns at once.
        silence: seconds a (token, renewals) pair may stand still; workers renew every 5 s.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        heartbeats: Heartbeats,
        notify: Callable[[], None],
        *,
        silence: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._heartbeats = heartbeats
        self._notify = notify
        self._silence = silence
        self._clock = clock
        self._first_seen: dict[Heartbeat, float] = {}
        # Seconds for which the most silent worker had not renewed its lease at the last look; 0 if none holds one.
        self.longest_silence = 0.0
        self._last_look = float("-inf")
        self._thread = Periodic("reaper", lambda: self.tick(), TICK_SECONDS)
        self._log = get_logger("reaper")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._thread.stop()

    def tick(self) -> None:
        """One look: take what is silent."""
        seen, self._first_seen = self._first_seen, {}
        last_look, self._last_look = self._last_look, self._clock()
        # If this fails nothing has been seen: while the database is away no worker can renew its lease in it.
        beats = self._heartbeats.read()
        now = self._clock()
        # This look counts too: what kept it waiting, such as a pool that had to connect again, kept workers waiting.
        late = now - last_look > LATE_SECONDS
        # A heartbeat seen for the first time starts its own clock: a restart or a late look takes no time from it.
        first_seen = {beat: now if late else seen.get(beat, now) for beat in beats}
        self.longest_silence = max((now - since for since in first_seen.values()), default=0.0)
        silent = [beat for beat, since in first_seen.items() if now - since >= self._silence]
        if silent and not self._writes_work():
            return
        for beat in silent:
            # If this fails `_first_seen` is still empty: workers could not write either, and get their full time again.
            if self._heartbeats.expire(beat):
                self._log.warning("worker lost", job_id=beat.job_id, lease_token=beat.token)
                self._notify()
        self._first_seen = first_seen

    def _writes_work(self) -> bool:
        """Whether a write gets through at once. One that had to wait kept workers from renewing as well."""
        started = self._clock()
        self._heartbeats.check_writable()
        return self._clock() - started < LATE_SECONDS
