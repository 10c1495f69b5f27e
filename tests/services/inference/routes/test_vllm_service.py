"""The whole service with the engine `vllm`, beside a stand-in: clients cannot tell it from the other."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.services.inference.harness import Tiny, alike
from tests.services.inference.server import Server, running
from tests.services.inference.vllm_stand_in import VllmStandIn

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def stand_in(tiny: Tiny) -> Iterator[VllmStandIn]:
    with VllmStandIn(tiny, context=512) as running:
        yield running


@pytest.fixture(scope="module")
def beside(tiny: Tiny, stand_in: VllmStandIn) -> Iterator[Server]:
    settings: dict[str, Any] = {"precision": "fp32", "adapter_slots": 2, "context": 512}
    with running(tiny, engine="vllm", vllm_url=stand_in.url, **settings) as server:
        yield server


@pytest.fixture(scope="module")
def own(tiny: Tiny) -> Iterator[Server]:
    with running(tiny, context=512) as server:
        yield server


def test_texts_scores_and_calls_are_the_own_engines(beside: Server, own: Server, adapters: list[str]) -> None:
    bodies = [
        {"inputs": "a", "parameters": {"details": True, "top_n_tokens": 2, "decoder_input_details": True}},
        {"inputs": "What?", "parameters": {"adapter_id": adapters[0], "details": True, "stop": ["e"]}},
        {"inputs": "a", "parameters": {"do_sample": True, "seed": 3, "temperature": 1.5, "best_of": 2}},
        {"inputs": "a", "parameters": {"grammar": {"type": "json", "value": SCHEMA}, "max_new_tokens": 60}},
    ]
    for body in bodies:
        one, other = (each.http.post("/generate", json=body) for each in (beside, own))
        assert one.status_code == 200, one.text
        for answer in (said := [one.json(), other.json()]):
            answer.get("details", {}).pop("adapter_load_ms", None)
        assert alike(*said), said
    tool = {"name": "look", "parameters": SCHEMA}
    chat = {
        "model": adapters[2],
        "messages": [{"role": "user", "content": "?"}],
        "tools": [{"type": "function", "function": tool}],
        "tool_choice": "required",
        "max_tokens": 100,
        "temperature": 0,
    }
    one, other = (each.http.post("/v1/chat/completions", json=chat).json() for each in (beside, own))
    assert "choices" in one, one
    (call,) = one["choices"][0]["message"]["tool_calls"]
    (expected,) = other["choices"][0]["message"]["tool_calls"]
    assert call["function"] == expected["function"]


def test_what_it_says_of_itself(beside: Server, adapters: list[str]) -> None:
    info = beside.http.get("/info").json()
    assert (info["runner"], info["precision"], info["model_dtype"]) == ("vllm", "fp32", "float32")
    assert (info["context"], info["max_rank"]) == (512, 64)
    assert beside.http.put(f"/adapters/{adapters[1]}").json()["state"] == "resident"
    metrics = beside.http.get("/metrics").text
    assert 'runner="vllm"' in metrics
    assert "tunesmith_adapters_resident 1.0" in metrics or "tunesmith_adapters_resident 2.0" in metrics


def test_adapters_beyond_the_places_take_turns_at_the_server(
    beside: Server, stand_in: VllmStandIn, adapters: list[str]
) -> None:
    for adapter in adapters * 2:
        assert beside.generate(inputs="a", parameters={"adapter_id": adapter}).status_code == 200
        assert len(stand_in.adapters) <= 2
    assert beside.serving.adapters.evictions >= 6


def test_refusals_name_the_field(beside: Server) -> None:
    refused = beside.generate(inputs="a", parameters={"do_sample": True, "typical_p": 0.5})
    assert (refused.status_code, "typical_p" in refused.json()["error"]) == (422, True)
    assert beside.generate(inputs="a", parameters={"adapter_id": "adapter-nobody"}).status_code == 404


def test_a_server_that_is_away_is_told_in_health_and_answers_until_it_is_back(
    beside: Server, stand_in: VllmStandIn, adapters: list[str]
) -> None:
    before = beside.ids(inputs="a", parameters={"adapter_id": adapters[0]})
    stand_in.die()
    away = beside.generate(inputs="a")
    assert (away.status_code, away.json()["error_type"]) == (503, "unavailable")
    streamed = beside.http.post("/generate_stream", json={"inputs": "a"})
    assert "the model server is away" in streamed.text
    # What came out a moment ago still counts as a sign of life.
    beside.serving.engine._last_token_at = 0.0  # type: ignore[attr-defined]
    assert beside.http.get("/health/ready").status_code == 503
    assert beside.http.get("/health/live").status_code == 200
    loading = beside.http.put(f"/adapters/{adapters[1]}")
    assert loading.status_code == 503
    stand_in.start()
    assert beside.http.get("/health/ready").status_code == 200
    assert beside.ids(inputs="a", parameters={"adapter_id": adapters[0]}) == before
    beside.wait_until_idle()
