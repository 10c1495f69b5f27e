"""What a vLLM server is asked and how its answers are read: HTTP on this machine's loopback, token ids both ways.

Owns vLLM's words (those of 0.32's OpenAI-compatible server) and what each of its refusals means here. Knows no queue,
no text and no templates.
"""

import json
import math
from collections.abc import AsyncGenerator, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from services.inference.engine.interface import Alternative, GenerationRequest, Sampling
from shared.errors import InvalidRequest, TunesmithError, Unavailable
from shared.logs import get_logger

_log = get_logger("vllm")
_GRAMMARS = {"json_schema": "json", "regex": "regex", "lark": "grammar"}
# Reading: the longest that a prompt or one token may take. A server that hangs must not hold its requests for ever.
TIMEOUT = httpx.Timeout(30.0, connect=5.0, read=300.0)


@dataclass(frozen=True, slots=True)
class Chosen:
    """One generated token."""

    id: int
    logprob: float
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One event of a stream.

    Attributes:
        finish: `stop` or `length` with the last tokens; None while the sequence goes on.
    """

    tokens: tuple[Chosen, ...]
    finish: str | None


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log probabilities of each prompt token but the first, and the likeliest in its place."""

    logprobs: tuple[float, ...]
    alternatives: tuple[tuple[Alternative, ...], ...]


class AdapterGone(Exception):
    """The server has no adapter of that name: it was started anew since the load."""


class VllmApi:
    """One server.

    Args:
        client: of the server's address, with `TIMEOUT`.
        stop_ids: tokens that end a text.
    """

    def __init__(self, client: httpx.AsyncClient, stop_ids: Collection[int]) -> None:
        self._client = client
        self._stop_ids = sorted(stop_ids)

    async def generate(self, model: str, request: GenerationRequest) -> AsyncGenerator[Chunk]:
        """The tokens of one sequence as they come; the server stops when this is closed.

        Args:
            model: the base's name or an adapter's.

        Raises:
            AdapterGone: before the first chunk.
            InvalidRequest: the server refuses the request.
            Unavailable: it cannot be reached, or went away in mid-stream.
            TunesmithError: code `generation_failed`.
        """
        body = self._body(model, request) | {"stream": True}
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.is_error:
                    raise _refusal(answer.status_code, await answer.aread())
                ended = False
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        chunk = _chunk(json.loads(line.removeprefix("data: ")), request.top_logprobs)
                        ended = ended or chunk.finish is not None
                        yield chunk
                if not ended:
                    raise _went_away()
        except httpx.TransportError as error:
            raise _went_away() from error

    async def read_prompt(self, model: str, request: GenerationRequest) -> PromptScores:
        """What the model thinks of a prompt. Raises as `generate`."""
        most = request.prompt_top_logprobs
        asked = {"max_tokens": 1, "prompt_logprobs": most, "logprobs": None, "structured_outputs": None}
        choice = (await self._post("/v1/completions", self._body(model, request) | asked))["choices"][0]
        logprobs, alternatives = [], []
        # The first token has nothing before it.
        for token, scores in zip(request.prompt[1:], choice["prompt_logprobs"][1:], strict=True):
            logprobs.append(float(scores[str(token)]["logprob"]))
            alternatives.append(_likeliest({int(key): each["logprob"] for key, each in scores.items()}, most))
        return PromptScores(tuple(logprobs), tuple(alternatives) if most else ())

    async def load(self, name: str, folder: Path) -> None:
        """Have the server read an adapter's folder. One that it has by this name already is that one: names are given
        once. Raises InvalidRequest (code `adapter_refused`), Unavailable, TunesmithError."""
        answer = await self._sent("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        if answer.is_server_error:
            # The adapter has passed this process's checks: it is not at fault.
            raise _refusal(answer.status_code, answer.content)
        if answer.is_error and "already been loaded" not in _message(answer.content):
            raise InvalidRequest(f"adapter refused by vLLM: {_message(answer.content)}", code="adapter_refused")

    async def unload(self, name: str) -> None:
        """Have the server forget an adapter; one that it does not have is forgotten. Raises Unavailable."""
        answer = await self._sent("/v1/unload_lora_adapter", {"lora_name": name})
        if answer.is_error and answer.status_code != 404:
            _log.warning("adapter not unloaded", adapter=name, error=_message(answer.content))

    async def adapters(self) -> list[str]:
        """Names of all adapters that the server has. Raises Unavailable."""
        try:
            listed = (await self._client.get("/v1/models")).raise_for_status().json()
        except httpx.HTTPError as error:
            raise _went_away() from error
        return [each["id"] for each in listed["data"] if each.get("parent")]

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        answer = await self._sent(path, body)
        if answer.is_error:
            raise _refusal(answer.status_code, answer.content)
        return answer.json()

    async def _sent(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        try:
            return await self._client.post(path, json=body)
        except httpx.TransportError as error:
            raise _went_away() from error

    def _body(self, model: str, request: GenerationRequest) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": model,
            "prompt": list(request.prompt),
            "max_tokens": request.max_new_tokens,
            "logprobs": request.top_logprobs,
            # What ends a text is this project's to say; the configuration of the model's repository is not asked.
            "ignore_eos": True,
            "stop_token_ids": [] if request.ignore_eos else self._stop_ids,
            "skip_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            # What one project's prompts have left in the cache must not make another's faster: that would tell of them.
            "cache_salt": request.cache_scope or "none",
        }
        if request.grammar is not None:
            body["structured_outputs"] = {_GRAMMARS[request.grammar.text.kind]: request.grammar.text.source}
        return body | sampling_fields(request.sampling)


def sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """vLLM's words for a way to sample.

    Raises:
        InvalidRequest: vLLM has no such thing; the field is named.
    """
    if sampling.typical_p is not None and sampling.typical_p < 1:
        raise InvalidRequest("typical_p is not supported by this server's engine (vLLM)", param="typical_p")
    fields: dict[str, Any] = {
        "temperature": 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
    }
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    if sampling.do_sample:
        given = {"top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p}
        fields |= {name: value for name, value in given.items() if value is not None}
        fields |= {"temperature": sampling.temperature, "seed": sampling.seed}
    return fields


def _chunk(event: Mapping[str, Any], top: int) -> Chunk:
    if "error" in event:
        # A stream begins with status 200, also where the request is refused.
        status = event["error"].get("code")
        raise _refusal(status if isinstance(status, int) else 500, json.dumps(event).encode())
    choice = event["choices"][0]
    scores = choice.get("logprobs") or {"token_logprobs": [], "top_logprobs": []}
    tokens = []
    for place, token in enumerate(choice.get("token_ids") or ()):
        logprob = scores["token_logprobs"][place]
        if logprob is None or not math.isfinite(logprob):
            raise TunesmithError("the engine failed on this request", code="generation_failed")
        others = (scores.get("top_logprobs") or [{}] * (place + 1))[place] or {}
        named = {int(key.removeprefix("token_id:")): value for key, value in others.items()}
        tokens.append(Chosen(token, float(logprob), _likeliest(named, top)))
    return Chunk(tuple(tokens), choice.get("finish_reason"))


def _likeliest(scores: Mapping[int, float], most: int) -> tuple[Alternative, ...]:
    """vLLM adds the token itself to the likeliest if it is none of them."""
    ordered = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    return tuple(Alternative(token, float(logprob)) for token, logprob in ordered[:most])


def _refusal(status: int, content: bytes) -> Exception:
    message = _message(content)
    if status == 404:
        return AdapterGone(message)
    if status == 400:
        return InvalidRequest(message)
    if status == 503:
        return _went_away()
    _log.error("vLLM failed on a request", status=status, error=message)
    return TunesmithError("the engine failed on this request", code="generation_failed")


def _message(content: bytes) -> str:
    try:
        body = json.loads(content)
        return str(body.get("error", body)["message"])[:500]
    except (ValueError, KeyError, TypeError, AttributeError):
        return content.decode(errors="replace")[:500]


def _went_away() -> Unavailable:
    return Unavailable("the model server is away; try again in a moment", code="engine_unavailable")
