"""What is asked of vLLM and how its answers are read, against what a real server said (`vllm_recorded.json`)."""

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.inference.engine.interface import Sampling
from services.inference.engine.vllm_api import AdapterGone, Chunk, VllmApi, sampling_fields
from shared.errors import InvalidRequest, TunesmithError, Unavailable
from tests.services.inference.engine import vllm_recorded
from tests.services.inference.engine.vllm_recorded import FOLDER, NAME, PROMPT, STOP_IDS, scored, streamed
from tests.services.inference.harness import Tiny
from tests.services.inference.vllm_stand_in import FIELDS, VllmStandIn

RECORDED: dict[str, dict[str, Any]] = json.loads(vllm_recorded.FILE.read_text())
Handler = Callable[[httpx.Request], httpx.Response]


def answered(name: str) -> Handler:
    """The server that said what was recorded, and is asked for nothing else."""
    exchange = RECORDED[name]

    def answer(request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.path) == (exchange["method"], exchange["path"])
        assert json.loads(request.content or "null") == exchange["body"]
        return httpx.Response(exchange["status"], text=exchange["content"])

    return answer


def said(handler: Handler, ask: Callable[[VllmApi], Any]) -> Any:
    async def run() -> Any:
        async with httpx.AsyncClient(base_url="http://vllm", transport=httpx.MockTransport(handler)) as client:
            return await ask(VllmApi(client, STOP_IDS))

    return asyncio.run(run())


def chunks(name: str) -> list[Chunk]:
    found: list[Chunk] = said(answered(name), lambda api: streamed(api, name))
    return found


def test_a_greedy_stream() -> None:
    found = chunks("greedy")
    tokens = [token for chunk in found for token in chunk.tokens]
    assert len(tokens) == 3
    assert [chunk.finish for chunk in found if chunk.finish] == ["length"]
    for token in tokens:
        assert len(token.alternatives) == 2
        best, second = token.alternatives
        assert (best.id, best.logprob) == (token.id, token.logprob)
        assert best.logprob > second.logprob
        assert math.isfinite(second.logprob)


def test_all_ways_to_sample_and_an_adapter() -> None:
    for name in ("sampled in all ways", "adapter"):
        tokens = [token for chunk in chunks(name) for token in chunk.tokens]
        assert len(tokens) == 3
        assert all(token.alternatives == () for token in tokens)
    body = RECORDED["sampled in all ways"]["body"]
    assert (body["cache_salt"], body["stop_token_ids"], body["seed"]) == ("a project", [], 11)
    assert RECORDED["adapter"]["body"]["model"] == NAME


@pytest.mark.parametrize("name", ["regular expression", "schema", "lark"])
def test_a_grammar_ends_with_the_token_that_ends_texts(name: str) -> None:
    found = chunks(name)
    assert found[-1].finish == "stop"
    assert found[-1].tokens[-1].id in STOP_IDS


def test_scores_of_a_prompt() -> None:
    scores = said(answered("scores"), scored)
    assert len(scores.logprobs) == len(scores.alternatives) == len(PROMPT) - 1
    assert all(logprob < 0 for logprob in scores.logprobs)
    for alternatives in scores.alternatives:
        assert len(alternatives) == 2
        assert alternatives[0].logprob >= alternatives[1].logprob


def test_adapters_are_loaded_listed_and_forgotten() -> None:
    folder = Path(FOLDER)
    assert said(answered("load"), lambda api: api.load(NAME, folder)) is None
    # Its name is given once: what is there by this name is this one.
    assert said(answered("load again"), lambda api: api.load(NAME, folder)) is None
    with pytest.raises(InvalidRequest, match="adapter refused by vLLM: ") as refused:
        said(answered("load what is not there"), lambda api: api.load("nothing", folder / "nowhere"))
    assert refused.value.code == "adapter_refused"
    assert said(answered("adapters"), lambda api: api.adapters()) == [NAME]
    assert said(answered("unload"), lambda api: api.unload(NAME)) is None
    assert said(answered("unload what is not there"), lambda api: api.unload("nothing")) is None


def test_a_server_that_fails_to_load_does_not_blame_the_adapter() -> None:
    with pytest.raises(TunesmithError) as failed:
        said(lambda _: httpx.Response(500, text="out of luck"), lambda api: api.load(NAME, Path(FOLDER)))
    assert (failed.value.status, failed.value.code) == (500, "generation_failed")


def test_refusals() -> None:
    with pytest.raises(AdapterGone, match="does not exist"):
        chunks("unknown adapter")
    with pytest.raises(InvalidRequest, match=r"context|tokens"):
        chunks("longer than the context")
    with pytest.raises(InvalidRequest, match=r"[Gg]rammar"):
        chunks("grammar that is none")
    with pytest.raises(InvalidRequest) as refused:
        sampling_fields(Sampling(do_sample=True, typical_p=0.9))
    assert refused.value.param == "typical_p"


@pytest.mark.parametrize(
    ("status", "content", "error"),
    [
        (500, '{"error": {"message": "out of luck"}}', TunesmithError),
        (500, "no JSON", TunesmithError),
        (503, "", Unavailable),
        # It ended without a last token: somebody killed it.
        (200, "", Unavailable),
        (200, 'data: {"error": {"message": "broken", "code": 500}}\n\ndata: [DONE]\n\n', TunesmithError),
    ],
)
def test_what_goes_wrong_is_an_error_of_ours_and_shows_nothing_of_vllms(
    status: int, content: str, error: type[TunesmithError]
) -> None:
    with pytest.raises(error) as raised:
        said(lambda _: httpx.Response(status, text=content), lambda api: streamed(api, "greedy"))
    assert type(raised.value) is error
    assert "luck" not in raised.value.message
    assert "broken" not in raised.value.message


def test_who_cannot_be_reached_is_away() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    for ask in (
        lambda api: streamed(api, "greedy"),
        scored,
        lambda api: api.adapters(),
        lambda api: api.load(NAME, Path()),
        lambda api: api.unload(NAME),
    ):
        with pytest.raises(Unavailable, match="away"):
            said(refuse, ask)


def test_the_stand_in_takes_and_gives_what_the_server_did(tiny: Tiny) -> None:
    bodies = [exchange["body"] for exchange in RECORDED.values() if exchange["path"] == "/v1/completions"]
    assert set().union(*bodies) == FIELDS
    recorded = json.loads(RECORDED["greedy"]["content"].split("\n\n")[1].removeprefix("data: "))
    with VllmStandIn(tiny) as server:
        body = RECORDED["greedy"]["body"] | {"model": server.base, "prompt": [67]}
        content = httpx.post(f"{server.url}/v1/completions", json=body).text
        refused = httpx.post(f"{server.url}/v1/completions", json=body | {"model": "nobody"})
    stood_in = json.loads(content.split("\n\n")[1].removeprefix("data: "))
    assert keys(stood_in) <= keys(recorded)
    assert refused.status_code == RECORDED["unknown adapter"]["status"]
    assert keys(refused.json()) == keys(json.loads(RECORDED["unknown adapter"]["content"]))


def keys(value: Any, path: str = "") -> set[str]:
    """Paths of all keys, those of tokens left out."""
    if isinstance(value, list):
        return set().union(*(keys(item, path) for item in value)) if value else set()
    if isinstance(value, dict):
        inner = {f"{path}.{'token' if key.startswith('token_id:') else key}": item for key, item in value.items()}
        return set(inner).union(*(keys(item, where) for where, item in inner.items()))
    return set()
