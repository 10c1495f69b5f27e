"""Residency over HTTP: loads, evictions, pins, refusals, and who finishes on what."""

import gc
import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.inference_api.administration import PROTECT_RECENT_SECONDS_OLD
from shared.storage.artifacts import new_id
from shared.storage.manifests import MANIFEST
from tests.services.inference.adapters_on_disk import publish
from tests.services.inference.harness import Tiny
from tests.services.inference.server import Server, running

PROMPT = "def f(x): return x"


@pytest.fixture(scope="module")
def small(tiny: Tiny) -> Iterator[Server]:
    """A server with room for two adapters."""
    with running(tiny, adapter_slots=2) as server:
        yield server


def resident(server: Server) -> set[str]:
    """The adapters in memory, when nothing is being loaded or unloaded any more."""
    deadline = time.monotonic() + 120
    while True:
        entries = server.http.get("/adapters").json()["data"]
        if all(entry["state"] == "resident" for entry in entries):
            return {entry["id"] for entry in entries}
        assert time.monotonic() < deadline, entries
        time.sleep(0.005)


def test_load_list_unload(tiny: Tiny) -> None:
    adapter = tiny.adapter(seed=31, r=4)
    with running(tiny) as server:
        assert resident(server) == set()
        loaded = server.http.put(f"/adapters/{adapter}").json()
        assert (loaded["id"], loaded["rank"], loaded["step"], loaded["state"]) == (adapter, 4, 7, "resident")
        assert loaded["bytes"] > 0
        assert loaded["ms"] > 0
        answer = server.generate(inputs=PROMPT, parameters={"adapter_id": adapter, "max_new_tokens": 2})
        assert "x-adapter-load-ms" not in answer.headers
        assert server.http.get("/adapters").json()["resident_bytes"] == loaded["bytes"]
        assert server.http.delete(f"/adapters/{adapter}").json() == {"id": adapter, "unloaded": True}
        assert server.http.delete(f"/adapters/{adapter}").json() == {"id": adapter, "unloaded": False}
        assert server.http.delete("/adapters/nobody").json()["unloaded"] is False
        again = server.generate(inputs=PROMPT, parameters={"adapter_id": adapter, "max_new_tokens": 2})
        assert float(again.headers["x-adapter-load-ms"]) > 0
        # Deleted from disk: gone from memory too, at the next request.
        tiny.store.remove(tiny.store.adapter(adapter))
        assert server.generate(inputs=PROMPT, parameters={"adapter_id": adapter}).status_code == 404
        assert resident(server) == set()


def test_an_adapter_published_while_serving_is_served(small: Server) -> None:
    """As is a checkpoint of a job that still trains: it is an adapter folder like any other."""
    for seed in (41, 42):
        adapter = small.tiny.adapter(seed=seed)
        ids = small.ids(inputs=PROMPT, parameters={"adapter_id": adapter, "max_new_tokens": 10})
        assert ids == small.tiny.oracle.ids(adapter, small.prompt(PROMPT), 10)


def test_the_least_recently_used_leaves_and_pinned_ones_stay(small: Server) -> None:
    a, b, c = (small.tiny.adapter(seed=50 + i) for i in range(3))
    small.http.put(f"/adapters/{a}/pin")
    small.http.put(f"/adapters/{b}")
    small.http.put(f"/adapters/{c}")
    assert resident(small) == {a, c}
    small.http.put(f"/adapters/{b}/pin")
    assert resident(small) == {a, b}
    # All room is pinned: a third cannot come in, and says so.
    refused = small.generate(inputs=PROMPT, parameters={"adapter_id": c})
    assert refused.status_code == 422
    assert "pinned" in refused.json()["error"]
    for pinned in (a, b):
        assert small.http.delete(f"/adapters/{pinned}/pin").json()["pinned"] is False
    assert small.http.put(f"/adapters/{c}").status_code == 200
    assert small.http.delete(f"/adapters/{a}/pin").status_code == 404


def test_more_adapters_than_slots_under_load_are_never_mixed_up(small: Server) -> None:
    """Six adapters through two slots, with unloads in between: every answer is its own adapter's."""
    adapters = [small.tiny.adapter(seed=60 + i, r=2 ** (i % 4)) for i in range(6)]
    prompt = small.prompt(PROMPT)
    expected = {adapter: small.tiny.oracle.ids(adapter, prompt, 6) for adapter in adapters}
    assert len({tuple(ids) for ids in expected.values()}) == 6
    chance = random.Random(0)
    work = [chance.choice(adapters) for _ in range(120)]

    def ask(adapter: str) -> list[int]:
        if chance.random() < 0.1:
            small.http.delete(f"/adapters/{chance.choice(adapters)}")
        return small.ids(inputs=PROMPT, parameters={"adapter_id": adapter, "max_new_tokens": 6})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, work))
    assert [expected[adapter] for adapter in work] == answers
    small.wait_until_idle()
    assert len(resident(small)) <= 2


def test_requests_in_flight_finish_on_what_they_began_with(small: Server) -> None:
    adapter = small.tiny.adapter(seed=70)
    body = {"inputs": PROMPT, "parameters": {"adapter_id": adapter, "max_new_tokens": 150, "ignore_eos_token": True}}
    with small.http.stream("POST", "/generate_stream", json=body) as stream:
        lines = stream.iter_lines()
        first = next(lines)
        assert small.http.delete(f"/adapters/{adapter}").json()["unloaded"] is True
        reloaded = small.ids(inputs=PROMPT, parameters={"adapter_id": adapter, "max_new_tokens": 5})
        events = [json.loads(line[5:]) for line in [first, *lines] if line]
    assert len(events) == 150
    assert [event["token"]["id"] for event in events[:5]] == reloaded
    small.wait_until_idle()
    assert resident(small) == {adapter}


def test_a_load_that_protects_recent_adapters_over_http(tiny: Tiny, adapters: list[str]) -> None:
    with running(tiny, adapter_slots=1) as server:
        assert server.http.put(f"/adapters/{adapters[0]}?protect_recent_seconds=60").json()["state"] == "resident"
        refused = server.http.put(f"/adapters/{adapters[1]}?protect_recent_seconds=60")
        assert (refused.status_code, refused.json()["error_type"]) == (429, "overloaded")
        assert resident(server) == {adapters[0]}
        for wrong in ("-1", "nan", "inf", "x", "1e9"):
            assert server.http.put(f"/adapters/{adapters[1]}?protect_recent_seconds={wrong}").status_code == 422
        # The name of the version before, with its meaning.
        assert server.http.put(f"/adapters/{adapters[1]}?{PROTECT_RECENT_SECONDS_OLD}=60").status_code == 429
        assert server.http.put(f"/adapters/{adapters[1]}").status_code == 200
        assert resident(server) == {adapters[1]}
        assert "tunesmith_adapter_loads_total 2.0" in server.http.get("/metrics").text


# ---------------------------------------------------------------------- refused


def spoilt(tiny: Tiny, how: str) -> str:
    """An adapter that must not be served; returns its id."""
    good = tiny.store.adapter(tiny.adapter(seed=80))
    adapter, folder = good.name, good
    if how in ("flipped bit", "flipped config"):
        path = folder / ("adapter_model.safetensors" if how == "flipped bit" else "adapter_config.json")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "truncated":
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "stray file":
        (folder / "more.bin").write_bytes(b"x")
    elif how == "missing file":
        (folder / "adapter_config.json").unlink()
    elif how == "no manifest":
        (folder / MANIFEST).unlink()
    elif how == "flipped manifest":
        (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"step": 7', '"step": 5'))
    elif how == "manifest of nonsense":
        (folder / MANIFEST).write_text("[" * 100_000)
    elif how == "symlink":
        path = folder / "adapter_model.safetensors"
        elsewhere = tiny.store.root / f"elsewhere-{adapter}"
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
    elif how == "another's folder":
        adapter = new_id("adapter")
        folder.rename(tiny.store.adapter(adapter))
    else:
        return republished(tiny, folder, how)
    return adapter


def republished(tiny: Tiny, good: Path, how: str) -> str:
    """A folder whose hashes are right and whose content is wrong."""
    adapter = new_id("adapter")
    changes: dict[str, Any] = {}
    with tiny.store.staged() as folder:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (folder / name).write_bytes((good / name).read_bytes())
        tensors = load_file(folder / "adapter_model.safetensors")
        first = sorted(tensors)[0]
        if how == "missing layer":
            tensors = {key: value for key, value in tensors.items() if ".layers.1." not in key}
        elif how == "NaN":
            tensors[first][0, 0] = float("nan")
        elif how == "wrong rank":
            tensors[first] = tensors[first][:4].clone()
        elif how == "foreign base":
            changes["base"] = "another-base"
        elif how == "other weights":
            changes["base_sha256"] = "0" * 64
        elif how == "unknown template":
            changes["template"] = "chat-0000000000000000"
        save_file(tensors, folder / "adapter_model.safetensors")
        if how == "lying header":
            data = (folder / "adapter_model.safetensors").read_bytes()
            (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 8 + data[8:])
        if how == "DoRA":
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
        publish(tiny.store, folder, adapter, tiny.manifest, template=changes.pop("template", None), **changes)
    return adapter


DEFECTS = [
    "flipped bit", "flipped config", "truncated", "stray file", "missing file", "no manifest", "flipped manifest",
    "manifest of nonsense",
    "symlink", "another's folder", "missing layer", "NaN", "wrong rank", "foreign base", "other weights",
    "unknown template", "lying header", "DoRA",
]  # fmt: skip


@pytest.mark.parametrize("how", DEFECTS)
def test_a_bad_adapter_is_refused_and_the_next_good_request_is_the_same(
    server: Server, adapters: list[str], how: str
) -> None:
    good = {"inputs": PROMPT, "parameters": {"adapter_id": adapters[0], "max_new_tokens": 10}}
    before = server.generate(**good).content
    bad = spoilt(server.tiny, how)
    for _ in range(2):
        answer = server.generate(inputs=PROMPT, parameters={"adapter_id": bad})
        assert answer.status_code == 422
        assert answer.json()["error_type"] == "validation"
        assert "refused" in answer.json()["error"]
        assert str(server.tiny.store.root) not in answer.text
    load = server.http.put(f"/adapters/{bad}")
    assert load.status_code == 422
    chat = {"model": bad, "messages": [{"role": "user", "content": "x"}], "stream": True}
    refused = server.http.post("/v1/chat/completions", json=chat)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
    assert bad not in resident(server)
    assert server.generate(**good).content == before


def test_an_adapter_above_the_limits_is_refused(tiny: Tiny) -> None:
    large, small = tiny.adapter(seed=90, r=64), tiny.adapter(seed=91, r=1)
    with running(tiny, adapter_bytes=20_000, max_rank=32) as server:
        for adapter, status in [(large, 422), (small, 200), (large, 422)]:
            assert server.http.put(f"/adapters/{adapter}").status_code == status


def test_adapters_that_come_and_go_leave_no_tensor_behind(tiny: Tiny, adapters: list[str]) -> None:
    with running(tiny, adapter_slots=2) as server:
        left = []
        for _ in range(4):
            for adapter in adapters:
                assert server.ids(inputs=PROMPT, parameters={"adapter_id": adapter, "max_new_tokens": 3})
                assert server.http.delete(f"/adapters/{adapter}").json()["unloaded"] is True
            server.wait_until_idle()
            gc.collect()
            left.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
        # In the first round kernels are chosen and buffers made.
        assert left[1:] == left[1:2] * 3
