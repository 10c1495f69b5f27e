"""The inference processes behind this gateway: which serves which base, and which should answer for which adapter.

What is known of them is the last state that `services.gateway.inference.prober` saw; requests read it and never wait
for it. Requests for one adapter go to one process (rendezvous hashing), so that it is loaded once and not everywhere;
if that process is down, to the next.
"""

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from services.gateway.models.store import Target
from shared.errors import Unavailable
from shared.inference_api.administration import INFO, InfoJson, adapter_path
from shared.logs import get_logger

UNLOAD_TIMEOUT_SECONDS = 5.0
# Prometheus itself waits for 10 s.
METRICS_TIMEOUT_SECONDS = 5.0


@dataclass(eq=False, slots=True)
class Replica:
    """One inference process as last seen.

    Attributes:
        info: its last answer to `/info`; None while it is down.
        waiting: the time limits of requests whose answer has not begun, none set.
        reported_down: whether the log has said so since it was last up.
    """

    url: str
    info: InfoJson | None = None
    waiting: set[asyncio.Timeout] = field(default_factory=set)
    reported_down: bool = False

    @property
    def base(self) -> str | None:
        """Id of the base it serves; None while it is down."""
        return self.info.base if self.info else None


class Replicas:
    """Chooses a process for each request and sends the request there.

    Args:
        client: without a base URL; closed by whoever made it.
        token: bearer token of inference; none is sent if empty.
    """

    def __init__(self, urls: tuple[str, ...], client: httpx.AsyncClient, token: str = "") -> None:
        self.all = tuple(Replica(url) for url in urls)
        self._client = client
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._log = get_logger("replicas")

    # ------------------------------------------------------------------ state, written by the prober

    async def ask(self, replica: Replica) -> InfoJson:
        """A process's `/info`.

        Raises:
            httpx.HTTPError: it is down or refuses.
            ValidationError: its answer is not what this version understands.
        """
        # A connection of its own, so that it is known whether new ones are accepted, and none stays open that a process
        # which is stopping would serve once more.
        answer = await self._client.get(replica.url + INFO, headers={**self._headers, "connection": "close"})
        answer.raise_for_status()
        return InfoJson.model_validate_json(answer.content)

    async def metrics(self, replica: Replica) -> str:
        """A process's Prometheus text.

        Raises:
            httpx.HTTPError: it is down or refuses.
            TimeoutError: it takes too long.
        """
        async with asyncio.timeout(METRICS_TIMEOUT_SECONDS):
            answer = await self._client.get(replica.url + "/metrics", headers=self._headers)
        answer.raise_for_status()
        return answer.text

    def mark_up(self, replica: Replica, info: InfoJson) -> None:
        if replica.info is None:
            self._log.info("inference is up", url=replica.url, base=info.base)
        replica.info, replica.reported_down = info, False

    def mark_down(self, replica: Replica, reason: str) -> None:
        """Pass a process over from now on; what waits for it goes to another one that serves the same base."""
        if not replica.reported_down:
            self._log.warning("inference is down", url=replica.url, reason=reason)
        base, replica.info, replica.reported_down = replica.base, None, True
        # With no other process, waiting is all that is left: it may only have been slow.
        if any(other.base == base for other in self.all if base):
            waiting, replica.waiting = replica.waiting, set()
            for limit in waiting:
                limit.reschedule(0)

    # ------------------------------------------------------------------ requests

    def served(self) -> list[str]:
        """Ids of the bases that are served now, in the order of the configured URLs."""
        return list(dict.fromkeys(replica.base for replica in self.all if replica.base))

    def info(self, base: str) -> InfoJson:
        """`/info` of a process that serves `base`.

        Raises:
            Unavailable: code `base_not_served`.
        """
        info = self._serving(Target(base))[0].info
        assert info is not None
        return info

    async def send(
        self, target: Target, path: str, body: bytes, headers: Mapping[str, str], *, method: str = "POST"
    ) -> httpx.Response:
        """Ask the process that should answer; the response's body is not read yet and must be closed.

        Raises:
            Unavailable: code `base_not_served`, or no process could be reached.
        """
        for replica in self._serving(target):
            if replica.base != target.base:
                # It went down while another one was tried.
                continue
            request = self._client.build_request(
                method, replica.url + path, content=body, headers={**headers, **self._headers}
            )
            try:
                async with self._unless_down(replica):
                    response = await self._client.send(request, stream=True)
            except TimeoutError:
                self._log.warning("request taken to another inference process", url=replica.url)
                continue
            except httpx.ConnectError as error:
                # Nothing was sent: another one can answer.
                self.mark_down(replica, str(error) or type(error).__name__)
                continue
            except httpx.TimeoutException as error:
                raise Unavailable("inference did not answer in time") from error
            except httpx.HTTPError as error:
                raise Unavailable("inference broke off the request") from error
            if response.status_code in (401, 403):
                await response.aclose()
                self._log.error("inference refuses this gateway's TUNESMITH_INTERNAL_TOKEN", url=replica.url)
                raise Unavailable("inference refuses this gateway", code="inference_misconfigured")
            return response
        raise Unavailable(f"no inference process for {target.base} can be reached")

    async def load(self, target: Target, *, protect_recent_seconds: float) -> int:
        """Have the process that would answer for an adapter load it now.

        Args:
            protect_recent_seconds: an adapter used there within so many seconds is not evicted for it.

        Returns:
            The status of its answer: 200 if the adapter is loaded, 429 if there is no room.

        Raises:
            Unavailable: as `send`.
        """
        assert target.adapter is not None
        path = adapter_path(target.adapter, protect_recent_seconds=protect_recent_seconds)
        response = await self.send(target, path, b"", {}, method="PUT")
        await response.aclose()
        return response.status_code

    async def unload(self, adapter: str) -> None:
        """Take an adapter out of every process's memory; a process that is down has none."""
        await asyncio.gather(*(self._unload(replica, adapter) for replica in self.all))

    async def _unload(self, replica: Replica, adapter: str) -> None:
        try:
            url = replica.url + adapter_path(adapter)
            await self._client.delete(url, headers=self._headers, timeout=UNLOAD_TIMEOUT_SECONDS)
        except httpx.HTTPError as error:
            self._log.warning("adapter not unloaded", url=replica.url, adapter=adapter, error=str(error))

    def _serving(self, target: Target) -> list[Replica]:
        """The processes that serve the target's base, best first."""
        found = [replica for replica in self.all if replica.base == target.base]
        if not found:
            bases = self.served()
            served = f"served are: {', '.join(bases)}" if bases else "no inference process answers"
            raise Unavailable(f"nobody serves the base model {target.base}; {served}", code="base_not_served")
        # A base needs no loading: any process will do, a different one each time.
        key = target.adapter or secrets.token_hex(8)
        return sorted(found, key=lambda replica: rendezvous(key, replica.url), reverse=True)

    @asynccontextmanager
    async def _unless_down(self, replica: Replica) -> AsyncIterator[None]:
        """Raise TimeoutError if the process is marked down before the block ends, and another one can take over."""
        async with asyncio.timeout(None) as limit:
            replica.waiting.add(limit)
            try:
                yield
            finally:
                replica.waiting.discard(limit)


def rendezvous(key: str, url: str) -> bytes:
    """The weight of a process for a key: the highest one answers (Thaler & Ravishankar 1996).

    When a process comes or goes, only the keys it wins or held move.
    """
    return hashlib.blake2b(f"{key}\x00{url}".encode(), digest_size=8).digest()
