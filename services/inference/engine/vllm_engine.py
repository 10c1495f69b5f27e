"""The engine `vllm`: this process admits, queues and names, and a vLLM server on the same machine generates.

One thread with an event loop of its own talks to the server. Every load of an adapter has a name that is given once, in
this process's life and in any other's, so that nothing is ever replaced under a name. A server that was started anew
has no adapters: each is loaded again by the first request that needs it.
"""

import asyncio
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from services.inference.engine.admission import Admission, Permit, check_length
from services.inference.engine.interface import (
    Cancelled,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Sink,
    Started,
    Stats,
    Token,
)
from services.inference.engine.output import Output
from services.inference.engine.vllm_api import (
    TIMEOUT,
    AdapterGone,
    Chosen,
    Chunk,
    PromptScores,
    VllmApi,
    sampling_fields,
)
from shared.datasets.tokens import Tokenizer
from shared.errors import InvalidRequest, TunesmithError, Unavailable
from shared.logs import get_logger

_log = get_logger("engine")


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """An adapter that was checked here; vLLM reads its folder itself.

    Attributes:
        nbytes: of its weights in the served dtype.
    """

    folder: Path
    rank: int
    nbytes: int


class VllmSequence:
    """A submitted request; lives on the engine's thread."""

    def __init__(self, request: GenerationRequest, sink: Sink, permit: Permit, tokenizer: Tokenizer) -> None:
        self.request, self.permit, self.sink = request, permit, sink
        self.text = Output(request, tokenizer)
        self.submitted_at = time.monotonic()
        self.task: asyncio.Task[None] | None = None
        self.ended = False

    @property
    def reserved(self) -> int:
        return len(self.request.prompt) + self.request.max_new_tokens

    def end(self, event: Event) -> None:
        """Send the last event, once."""
        if not self.ended:
            self.ended = True
            self.permit.release()
            self.sink(event)


class VllmEngine:
    """`Engine` by a vLLM server.

    Args:
        url: of the server.
        base: what the server calls the base model.
        rows: sequences generated at once; the server's `--max-num-seqs`.
        context: most tokens of one sequence; the server's `--max-model-len`.
        vocabulary: how many scores the model gives.
        transport: of HTTP, instead of a connection to `url`.
    """

    def __init__(
        self,
        url: str,
        base: str,
        tokenizer: Tokenizer,
        admission: Admission,
        *,
        rows: int,
        context: int,
        vocabulary: int,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._base, self._tokenizer, self._admission = base, tokenizer, admission
        self._context, self._vocabulary = context, vocabulary
        added = tokenizer.fast.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)
        # Adapters of another life of this process are another's.
        self._life = secrets.token_hex(4)
        # Several loads at a time, and connections of streams that are being closed.
        # vLLM closes what was unused for 5 s: a request sent at that moment would be lost.
        limits = httpx.Limits(max_connections=2 * rows + 16, keepalive_expiry=2)
        client = httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits, transport=transport, trust_env=False)
        self._client, self._api = client, VllmApi(client, tokenizer.stop_ids)
        self._closing = False
        # From here on only the engine's thread writes.
        self._adapters: dict[str, AdapterFolder] = {}
        self._loading: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._running: set[VllmSequence] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._rows = asyncio.Semaphore(rows)
        self._chunks = self._tokens = 0
        self._last_token_at = 0.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self._later(self._forget_others())

    @property
    def context(self) -> int:
        return self._context

    def submit(self, request: GenerationRequest, sink: Sink, permit: Permit | None = None) -> VllmSequence:
        """See `Engine.submit`.

        Raises:
            InvalidRequest: also for what vLLM cannot do; the field is named.
        """
        check_length(len(request.prompt), request.max_new_tokens, self._context)
        for param, tokens in (("inputs", request.prompt), ("logit_bias", [t for t, _ in request.sampling.logit_bias])):
            if not all(0 <= token < self._vocabulary for token in tokens):
                raise InvalidRequest("a token id is outside the vocabulary", param=param)
        sampling_fields(request.sampling)
        if permit is None:
            permit = self._admission.acquire(len(request.prompt))
        else:
            permit.resize(len(request.prompt))
        if self._closing:
            permit.release()
            raise Unavailable("the server is shutting down")
        sequence = VllmSequence(request, sink, permit, self._tokenizer)
        self._loop.call_soon_threadsafe(self._begin, sequence)
        return sequence

    def cancel(self, handle: VllmSequence) -> None:
        """See `Engine.cancel`."""
        # Without its loop the engine has ended everything.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._cancel, handle)

    def load(self, uid: str, weights: AdapterFolder) -> "Future[None]":
        """See `Engine.load`."""
        return self._later(self._load(uid, weights))

    def unload(self, uid: str) -> "Future[None]":
        """See `Engine.unload`."""
        return self._later(self._unload(uid))

    def stats(self) -> Stats:
        running = list(self._running)
        return Stats(
            running=len(running),
            waiting=self._admission.requests,
            waiting_tokens=self._admission.tokens,
            batch_tokens=sum(sequence.reserved for sequence in running),
            adapters=len(self._adapters),
            steps=self._chunks,
            tokens=self._tokens,
            last_token_at=self._last_token_at,
        )

    def close(self) -> None:
        """Fail what is left and end the thread."""
        if not self._closing:
            self._closing = True
            asyncio.run_coroutine_threadsafe(self._end_everything(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    # ------------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    def _later(self, work: Coroutine[None, None, None]) -> "Future[None]":
        """Run on the engine's thread. Cannot be cancelled: the server would have half of it."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()
        if self._closing:
            work.close()
            done.set_exception(Unavailable("the server is shutting down"))
            return done

        async def run() -> None:
            try:
                await work
            except asyncio.CancelledError:
                done.set_exception(Unavailable("the server is shutting down"))
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._loop.call_soon_threadsafe(lambda: self._spawn(run()))
        return done

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _begin(self, sequence: VllmSequence) -> None:
        sequence.task = self._spawn(self._generate(sequence))

    def _cancel(self, sequence: VllmSequence) -> None:
        if sequence.task is not None:
            sequence.task.cancel()

    async def _generate(self, sequence: VllmSequence) -> None:
        """One request from the queue to its last event."""
        try:
            async with self._rows:
                sequence.permit.release()
                self._running.add(sequence)
                await self._stream(sequence, time.monotonic() - sequence.submitted_at)
        except asyncio.CancelledError:
            sequence.end(Failed(Unavailable("the server is shutting down")) if self._closing else Cancelled())
        except TunesmithError as error:
            sequence.end(Failed(error))
        except Exception as error:
            _log.error("a request failed in the engine", exc_info=error)
            sequence.end(Failed(TunesmithError("the engine failed on this request", code="generation_failed")))
        finally:
            self._running.discard(sequence)

    async def _stream(self, sequence: VllmSequence, queue_seconds: float) -> None:
        request = sequence.request
        started = Started(queue_seconds)
        if request.prompt_logprobs or request.max_new_tokens == 0:
            scores = await self._scores(request)
            if request.prompt_logprobs:
                started = Started(queue_seconds, scores.logprobs, scores.alternatives)
        if request.max_new_tokens == 0:
            sequence.sink(started)
            sequence.end(Finished("length"))
            return
        begun = False
        async with aclosing(self._chunks_of(request)) as chunks:
            async for chunk in chunks:
                if not begun:
                    sequence.sink(started)
                    begun = True
                self._take(sequence, chunk)
                if sequence.ended and chunk.finish is None:
                    # Closing the stream is how the server learns that nobody wants more.
                    return
        if not sequence.ended:
            raise TunesmithError("the engine ended this answer too early", code="generation_failed")

    def _take(self, sequence: VllmSequence, chunk: Chunk) -> None:
        """Pass a chunk's tokens on; what comes after a stop string is nobody's."""
        self._chunks += 1
        for place, chosen in enumerate(chunk.tokens):
            last = chunk.finish == "stop" and place == len(chunk.tokens) - 1
            self._accept(sequence, chosen, last=last)
            if sequence.ended:
                return

    def _accept(self, sequence: VllmSequence, chosen: Chosen, *, last: bool) -> None:
        self._tokens += 1
        self._last_token_at = time.monotonic()
        text, reason = sequence.text.push(chosen.id, last=last)
        special = chosen.id in self._special
        sequence.sink(Token(chosen.id, text, chosen.logprob, special, chosen.alternatives, reason))
        if reason is not None:
            sequence.end(Finished(reason))

    async def _scores(self, request: GenerationRequest) -> PromptScores:
        try:
            return await self._api.read_prompt(self._model(request), request)
        except AdapterGone:
            await self._load_again(request.adapter)
            return await self._api.read_prompt(self._model(request), request)

    async def _chunks_of(self, request: GenerationRequest) -> AsyncGenerator[Chunk]:
        try:
            async with aclosing(self._api.generate(self._model(request), request)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except AdapterGone:
            await self._load_again(request.adapter)
            async with aclosing(self._api.generate(self._model(request), request)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def _end_everything(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    # ------------------------------------------------------------------ adapters

    def _model(self, request: GenerationRequest) -> str:
        """What the server calls what the request asks for."""
        return self._base if request.adapter is None else self._name(request.adapter)

    def _name(self, uid: str) -> str:
        return f"{uid}.{self._life}"

    async def _load(self, uid: str, weights: AdapterFolder) -> None:
        if uid in self._adapters:
            raise ValueError(f"adapter {uid} is loaded already")
        await self._api.load(self._name(uid), weights.folder)
        self._adapters[uid] = weights

    async def _load_again(self, uid: str | None) -> None:
        """Once for all requests that found the server without the adapter."""
        if uid is None:
            raise Unavailable(f"the model server does not serve {self._base}", code="engine_unavailable")
        async with self._loading[uid]:
            name, weights = self._name(uid), self._adapters[uid]
            if name not in await self._api.adapters():
                await self._api.load(name, weights.folder)
                _log.info("adapter loaded again", adapter=uid)

    async def _unload(self, uid: str) -> None:
        if self._adapters.pop(uid, None) is None:
            return
        self._loading.pop(uid, None)
        try:
            await self._api.unload(self._name(uid))
        except Unavailable:
            # It comes back without any.
            return

    async def _forget_others(self) -> None:
        """Give back what this process had loaded before it was started anew."""
        try:
            for name in await self._api.adapters():
                if not name.endswith(f".{self._life}"):
                    await self._api.unload(name)
        except Unavailable:
            # It is being started, and has none.
            return
