"""Whether the hub gives a base to this installation, asked when a job names one that nobody has prepared.

Owns how often it is asked. That a base is gated or missing is the request's fault while the request waits; later it
would only be a job's that never starts.
"""

import threading
import time
from collections.abc import Callable

from services.gateway.bases.metadata import BaseMetadata
from shared.bases.catalogue import Catalogue
from shared.bases.hub import REFUSALS, check_access
from shared.errors import InvalidRequest, TunesmithError

FRESH_SECONDS = 60.0
TIMEOUT_SECONDS = 3.0


class HubAccess:
    """What the hub said of each base, at most a minute old.

    Args:
        metadata: what is known of a base that has been prepared; None for one that has not.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        metadata: Callable[[str], BaseMetadata | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalogue = catalogue
        self._metadata = metadata
        self._clock = clock
        self._asking = threading.Lock()
        # Until when an answer counts, and the refusal in it.
        self._answers: dict[str, tuple[float, TunesmithError | None]] = {}

    def check(self, base_id: str) -> None:
        """Nothing, also if the hub does not answer, another request is asking it, or the base needs no hub any more.

        Raises:
            InvalidRequest: the hub refuses the base, or does not have it.
        """
        source = self._catalogue.get(base_id).source
        if not source.startswith("hub:") or self._metadata(base_id) is not None:
            return
        refusal = self._refusal(source)
        if refusal is not None:
            raise InvalidRequest(f"{base_id}: {refusal.message}", param="model", code=refusal.code)

    def _refusal(self, source: str) -> TunesmithError | None:
        until, refusal = self._answers.get(source, (0.0, None))
        # A hub that is away takes seconds to fail: it must not hold more than one thread.
        if self._clock() < until or not self._asking.acquire(blocking=False):
            return refusal
        try:
            refusal = _ask(source)
            self._answers[source] = (self._clock() + FRESH_SECONDS, refusal)
        finally:
            self._asking.release()
        return refusal


def _ask(source: str) -> TunesmithError | None:
    repo, _, commit = source.removeprefix("hub:").partition("@")
    try:
        check_access(repo, commit, TIMEOUT_SECONDS)
    except TunesmithError as error:
        return error if error.code in REFUSALS else None
    return None
