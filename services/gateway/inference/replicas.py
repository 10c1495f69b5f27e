"""The inference processes behind this gateway: who serves which base, and who should answer for which adapter.

Each one's base is learnt from its `/info`, on first use and again every few seconds. Requests for one adapter go to one
process (rendezvous hashing), so that it is loaded once and not everywhere; if that process is away, to the next.
"""

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from services.gateway.models.store import Target
from shared.errors import Unavailable
from shared.logs import get_logger

FRESH_SECONDS = 10.0
RETRY_SECONDS = 1.0
INFO_TIMEOUT_SECONDS = 5.0


@dataclass(slots=True)
class Replica:
    """One inference process as last seen; `base` is None while it does not answer."""

    url: str
    base: str | None = None
    info: dict[str, Any] = field(default_factory=dict)
    asked_at: float = float("-inf")
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Replicas:
    """Sends requests to inference.

    Args:
        client: without a base URL; closed by whoever made it.
        token: bearer token of inference; none is sent if empty.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        urls: tuple[str, ...],
        client: httpx.AsyncClient,
        token: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replicas = [Replica(url) for url in urls]
        self._client = client
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._clock = clock
        self._log = get_logger("replicas")

    async def served(self) -> list[str]:
        """Ids of the bases that are served now, in the order of the configured URLs."""
        await self._refresh()
        return list(dict.fromkeys(replica.base for replica in self._replicas if replica.base))

    async def info(self, base: str) -> dict[str, Any]:
        """`/info` of a process that serves `base`.

        Raises:
            Unavailable: none does.
        """
        return (await self._serving(Target(base)))[0].info

    async def send(
        self, target: Target, path: str, body: bytes, headers: Mapping[str, str], *, method: str = "POST"
    ) -> httpx.Response:
        """Ask the process that should answer; the response's body is not read yet and must be closed.

        Raises:
            Unavailable: code `base_not_served`, or nobody could be reached.
        """
        for replica in await self._serving(target):
            request = self._client.build_request(
                method, replica.url + path, content=body, headers={**headers, **self._headers}
            )
            try:
                response = await self._client.send(request, stream=True)
            except httpx.ConnectError as error:
                # Nothing was sent: another one can answer.
                self._log.warning("inference is away", url=replica.url, error=str(error))
                replica.base, replica.asked_at = None, self._clock()
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

    async def load(self, target: Target, *, gently: float) -> int:
        """Have the process that would answer for an adapter load it now.

        Args:
            gently: seconds; what was used there within this time is not evicted for it.

        Returns:
            The status of its answer: 200 if the adapter is loaded, 429 if there is no room.

        Raises:
            Unavailable: as `send`.
        """
        response = await self.send(target, f"/adapters/{target.adapter}?gently={gently:g}", b"", {}, method="PUT")
        await response.aclose()
        return response.status_code

    async def unload(self, adapter: str) -> None:
        """Take an adapter out of every process's memory; who is away has none."""
        await asyncio.gather(*(self._unload(replica, adapter) for replica in self._replicas))

    async def _unload(self, replica: Replica, adapter: str) -> None:
        try:
            url = f"{replica.url}/adapters/{adapter}"
            await self._client.delete(url, headers=self._headers, timeout=INFO_TIMEOUT_SECONDS)
        except httpx.HTTPError as error:
            self._log.warning("adapter not unloaded", url=replica.url, adapter=adapter, error=str(error))

    async def _serving(self, target: Target) -> list[Replica]:
        """Who serves the target's base, best first."""
        await self._refresh()
        found = [replica for replica in self._replicas if replica.base == target.base]
        if not found:
            bases = list(dict.fromkeys(replica.base for replica in self._replicas if replica.base))
            served = f"served are: {', '.join(bases)}" if bases else "no inference process answers"
            raise Unavailable(f"nobody serves the base model {target.base}; {served}", code="base_not_served")
        # A base needs no loading: any process will do, a different one each time.
        key = target.adapter or secrets.token_hex(8)
        return sorted(found, key=lambda replica: rendezvous(key, replica.url), reverse=True)

    async def _refresh(self) -> None:
        await asyncio.gather(*(self._ask(replica) for replica in self._replicas))

    async def _ask(self, replica: Replica) -> None:
        async with replica.lock:
            patience = FRESH_SECONDS if replica.base else RETRY_SECONDS
            if self._clock() - replica.asked_at < patience:
                return
            try:
                answer = await self._client.get(
                    f"{replica.url}/info", headers=self._headers, timeout=INFO_TIMEOUT_SECONDS
                )
                answer.raise_for_status()
                replica.info = answer.json()
                replica.base = str(replica.info["base"])
            except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
                if replica.base or replica.asked_at == float("-inf"):
                    self._log.warning("inference does not answer", url=replica.url, error=str(error))
                replica.base = None
            replica.asked_at = self._clock()


def rendezvous(key: str, url: str) -> bytes:
    """The weight of a process for a key: the highest one answers (Thaler & Ravishankar 1996).

    When a process comes or goes, only the keys it wins or held move.
    """
    return hashlib.blake2b(f"{key}\x00{url}".encode(), digest_size=8).digest()
