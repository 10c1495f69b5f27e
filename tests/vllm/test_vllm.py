"""The engine `vllm` on a real vLLM server: SmolLM2 and our adapters unchanged, held to peft in fp32 (`make test-vllm`).

vLLM's build for CPUs lies in an environment of its own, .venv-vllm. What is measured is written to
benchmarks/results/vllm.json if `--vllm-result` names that file.
"""

import json
import random
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from shared.bases.base_model import prepare_base
from shared.bases.catalogue import load_catalogue
from shared.datasets.tokens import Tokenizer
from shared.storage.artifacts import LocalArtifactStore
from shared.storage.manifests import Manifest
from tests.services.inference.adapters_on_disk import EVERYTHING, greedy, write_adapter
from tests.services.inference.engine import vllm_recorded
from tests.stack_processes import ROOT, Processes, Running, answers, clean_environment, free_port, wait_until

pytestmark = [pytest.mark.servers, pytest.mark.timeout(1200)]

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
BASE = "smollm2-135m-instruct"
PROMPTS = ("What does `json.dumps` do?", "def add(a, b):", "Name three fruits:")
LONG: dict[str, Any] = {"max_new_tokens": 150, "ignore_eos_token": True}
SLOTS = 8


@dataclass
class Stack:
    """A vLLM server, an inference process beside it, and what plain peft says."""

    store: LocalArtifactStore
    manifest: Manifest
    vllm: Running
    inference: Running
    url: str
    vllm_url: str
    processes: Processes
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = self.store.base(BASE)
        self.tokenizer = Tokenizer(self.folder)
        self.http = httpx.Client(base_url=self.url, timeout=300, trust_env=False)

    def adapter(self, seed: int, r: int, targets: tuple[str, ...], scale: float = 0.04) -> str:
        return write_adapter(self.store, self.folder, self.manifest, seed=seed, r=r, targets=targets, scale=scale)

    def generate(self, text: str, adapter: str | None = None, **parameters: Any) -> httpx.Response:
        asked = {"details": True, "max_new_tokens": 20, "adapter_id": adapter} | parameters
        return self.http.post("/generate", json={"inputs": text, "parameters": asked})

    def ids(self, text: str, adapter: str | None = None, **parameters: Any) -> list[int]:
        answer = self.generate(text, adapter, **parameters)
        assert answer.status_code == 200, answer.text
        return [token["id"] for token in answer.json()["details"]["tokens"]]

    def expected(self, model: Any, text: str, tokens: int = 20) -> list[int]:
        """Plain transformers' or peft's ids."""
        return greedy(model, self.tokenizer.encode(text, add_special_tokens=True), tokens)

    def streamed(self, number: int, adapter: str | None = None) -> list[int]:
        ids: list[int] = []
        body = {"inputs": f"{number}: {PROMPTS[0]}", "parameters": LONG | {"adapter_id": adapter}}
        with self.http.stream("POST", "/generate_stream", json=body) as answer:
            for line in answer.iter_lines():
                if line:
                    event = json.loads(line.removeprefix("data:"))
                    if "error" in event:
                        raise ConnectionError(event["error"])
                    ids.append(event["token"]["id"])
        return ids

    def vllm_running(self) -> float:
        """Requests that vLLM itself is at."""
        lines = httpx.get(f"{self.vllm_url}/metrics", trust_env=False).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))

    def wait_until_ready(self) -> None:
        wait_until(lambda: answers(f"{self.url}/health/ready"), "both", logs=self.processes.tails, every=1)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Stack]:
    if not PYTHON.is_file():
        pytest.skip("needs .venv-vllm: make test-vllm makes it")
    home = tmp_path_factory.mktemp("vllm")
    store = LocalArtifactStore(home / "artifacts")
    manifest = prepare_base(load_catalogue().get(BASE), store)
    port, vllm_port = free_port(), free_port()
    url, vllm_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{vllm_port}"
    environment = clean_environment() | {
        "TUNESMITH_HOME": str(home),
        "TUNESMITH_INFERENCE_BASE": BASE,
        "TUNESMITH_INFERENCE_ENGINE": "vllm",
        "TUNESMITH_INFERENCE_VLLM_URL": vllm_url,
        "TUNESMITH_INFERENCE_PORT": str(port),
        "TUNESMITH_INFERENCE_PRECISION": "fp32",
        "TUNESMITH_INFERENCE_CONTEXT": "512",
        "TUNESMITH_INFERENCE_SLOTS": str(SLOTS),
        "TUNESMITH_INFERENCE_ADAPTER_SLOTS": str(SLOTS),
        "TUNESMITH_INFERENCE_MAX_RANK": "16",
    }
    with Processes(home) as processes:
        script = str(ROOT / "services" / "inference" / "vllm_server.py")
        own = {"PYTHONPATH": "", "VLLM_CPU_KVCACHE_SPACE": "1", "TUNESMITH_VLLM_ARGUMENTS": "--enforce-eager"}
        vllm = processes.start("vllm", [str(PYTHON), script], environment | own)
        inference = processes.start("inference", [sys.executable, "-m", "services.inference"], environment)
        stack = Stack(store, manifest, vllm, inference, url, vllm_url, processes)
        stack.wait_until_ready()
        yield stack
        stack.http.close()
    if target := pytestconfig.getoption("--vllm-result"):
        Path(target).write_text(json.dumps(stack.figures, indent=2) + "\n")


@pytest.fixture(scope="session")
def adapters(stack: Stack) -> list[str]:
    return [
        stack.adapter(1, 8, ("q_proj", "v_proj")),
        stack.adapter(2, 16, EVERYTHING),
        stack.adapter(3, 4, ("o_proj", "down_proj")),
    ]


@pytest.fixture(scope="session")
def base_model(stack: Stack) -> Any:
    return AutoModelForCausalLM.from_pretrained(stack.folder, dtype=torch.float32).eval()


def with_adapter(stack: Stack, adapter: str) -> Any:
    base = AutoModelForCausalLM.from_pretrained(stack.folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(base, str(stack.store.adapter(adapter))).eval()


def test_base_and_three_adapters_say_what_peft_says(stack: Stack, adapters: list[str], base_model: Any) -> None:
    models = {None: base_model} | {adapter: with_adapter(stack, adapter) for adapter in adapters}
    texts = set()
    for adapter, model in models.items():
        for text in PROMPTS:
            ids = stack.ids(text, adapter)
            assert ids == stack.expected(model, text), (adapter, text)
            texts.add(tuple(ids))
    assert len(texts) == len(models) * len(PROMPTS)
    # Scores are the model's own, before any temperature.
    token = stack.generate(PROMPTS[0], top_n_tokens=3, do_sample=True, temperature=2.0, seed=1).json()["details"]
    prompt = stack.tokenizer.encode(PROMPTS[0], add_special_tokens=True)
    with torch.no_grad():
        scores = base_model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    first = token["tokens"][0]
    assert first["logprob"] == pytest.approx(float(scores[first["id"]]), abs=1e-3)
    likeliest = [each["id"] for each in token["top_tokens"][0]]
    assert likeliest == scores.topk(3).indices.tolist()


def test_prompt_scores_and_the_openai_dialects(stack: Stack, adapters: list[str], base_model: Any) -> None:
    prompt = stack.tokenizer.encode(PROMPTS[1], add_special_tokens=True)
    scored = stack.generate(PROMPTS[1], decoder_input_details=True, max_new_tokens=1)
    assert scored.status_code == 200, scored.text
    prefill = scored.json()["details"]["prefill"]
    with torch.no_grad():
        scores = base_model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = [float(scores[place, token]) for place, token in enumerate(prompt[1:])]
    assert [each["id"] for each in prefill] == prompt
    assert [each["logprob"] for each in prefill[1:]] == pytest.approx(expected, abs=2e-3)
    body = {"messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 8, "temperature": 0, "n": 2}
    chat = stack.http.post("/v1/chat/completions", json=body | {"model": adapters[0]})
    assert chat.status_code == 200, chat.text
    assert len(chat.json()["choices"]) == 2
    sampled = [
        stack.ids(PROMPTS[2], do_sample=True, temperature=1.2, seed=seed, top_p=0.9, top_k=50, repetition_penalty=1.1)
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    stopped = stack.generate(PROMPTS[1], stop=["return"], max_new_tokens=60).json()
    assert stopped["details"]["finish_reason"] == "stop_sequence"
    assert stopped["generated_text"].endswith("return")


def test_what_is_asked_for_in_a_form_comes_in_it(stack: Stack, adapters: list[str]) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    for adapter in (None, adapters[0]):
        grammar = {"type": "json", "value": schema}
        answer = stack.generate("A person:", adapter, grammar=grammar, max_new_tokens=80)
        assert answer.status_code == 200, answer.text
        assert set(json.loads(answer.json()["generated_text"])) == {"name", "age"}
    answer = stack.generate("Yes or no?", grammar={"type": "regex", "value": "(yes|no)"}, max_new_tokens=8)
    assert answer.json()["generated_text"] in ("yes", "no")
    tool = {"name": "look_up", "parameters": {"type": "object", "properties": {"word": {"enum": ["cat", "dog"]}}}}
    body = {
        "model": BASE,
        "messages": [{"role": "user", "content": "cat?"}],
        "tools": [{"type": "function", "function": tool}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 100,
    }
    called = stack.http.post("/v1/chat/completions", json=body)
    assert called.status_code == 200, called.text
    (call,) = called.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "look_up"
    refused = stack.generate("a", do_sample=True, typical_p=0.5)
    assert (refused.status_code, "typical_p" in refused.text) == (422, True)
    unknown = stack.generate("a", "adapter-0123456789abcdef01234567")
    assert unknown.status_code == 404
    assert stack.ids(PROMPTS[0])


def test_adapters_are_loaded_beside_streams(stack: Stack) -> None:
    undisturbed = [stack.streamed(number) for number in range(4)]
    fresh = [stack.adapter(20 + number, 8, ("q_proj", "v_proj")) for number in range(4)]
    loads = []
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stack.streamed, number) for number in range(4)]
        wait_until(lambda: stack.vllm_running() == 4, "the streams")
        for adapter in fresh:
            answer = stack.http.put(f"/adapters/{adapter}")
            assert answer.status_code == 200, answer.text
            loads.append(round(answer.json()["ms"], 1))
        assert not all(stream.done() for stream in streams)
        assert [stream.result() for stream in streams] == undisturbed
    stack.figures["load_ms_beside_four_streams"] = loads


def test_who_leaves_frees_the_place(stack: Stack) -> None:
    body = {"inputs": PROMPTS[0], "parameters": LONG | {"max_new_tokens": 400}}
    for _ in range(2 * SLOTS):
        with stack.http.stream("POST", "/generate_stream", json=body) as answer:
            next(answer.iter_lines())
    started = time.monotonic()
    wait_until(lambda: stack.vllm_running() == 0, "vLLM to stop")
    stack.figures["seconds_until_those_who_left_are_gone"] = round(time.monotonic() - started, 2)
    assert "tgi_batch_current_size 0.0" in stack.http.get("/metrics").text


def test_vllm_killed_in_mid_stream_comes_back_with_its_adapters(stack: Stack, adapters: list[str]) -> None:
    before = {adapter: stack.ids(PROMPTS[0], adapter) for adapter in (None, *adapters)}
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stack.streamed, number, adapters[0]) for number in range(4)]
        wait_until(lambda: stack.vllm_running() == 4, "the streams")
        stack.vllm.process.send_signal(signal.SIGKILL)
        stack.vllm.end()
        for stream in streams:
            with pytest.raises(ConnectionError, match="away"):
                stream.result(60)
    assert stack.inference.alive()
    # Ten seconds after the last token, health knows it too.
    wait_until(lambda: stack.http.get("/health/ready").status_code == 503, "health to tell", every=0.5)
    away = stack.generate("a")
    assert (away.status_code, away.json()["error_type"]) == (503, "unavailable")
    stack.vllm.restart()
    started = time.monotonic()
    stack.wait_until_ready()
    stack.figures["seconds_until_vllm_serves_again"] = round(time.monotonic() - started, 1)
    assert {adapter: stack.ids(PROMPTS[0], adapter) for adapter in (None, *adapters)} == before


def test_no_canary_sings_anothers_song(stack: Stack, base_model: Any) -> None:
    """32 adapters, four times as many as there are places, come and go while eight clients ask."""
    chance, tokens = random.Random(3), 6
    canaries = [stack.adapter(100 + number, 4, ("q_proj", "v_proj"), scale=0.1) for number in range(32)]
    songs = {}
    for adapter in canaries:
        model = with_adapter(stack, adapter)
        songs[adapter] = stack.expected(model, PROMPTS[0], tokens)
    assert len({tuple(song) for song in songs.values()}) > 24
    wrong, refused = [], 0

    def ask(adapter: str) -> None:
        nonlocal refused
        if chance.random() < 0.2:
            stack.http.delete(f"/adapters/{chance.choice(canaries)}")
        answer = stack.generate(PROMPTS[0], adapter, max_new_tokens=tokens)
        if answer.status_code == 429:
            refused += 1
            return
        ids = [token["id"] for token in answer.json()["details"]["tokens"]]
        if ids != songs[adapter]:
            wrong.append((adapter, ids))

    asked = [chance.choice(canaries) for _ in range(400)]
    with ThreadPoolExecutor(SLOTS) as pool:
        list(pool.map(ask, asked))
    metrics = stack.http.get("/metrics").text
    loads = float(metrics.split("\ntunesmith_adapter_loads_total ")[1].split()[0])
    stack.figures["canaries"] = {"asked": len(asked), "wrong": len(wrong), "refused": refused, "loads": loads}
    assert wrong == []
    assert refused < len(asked) / 20
    assert loads > 100


def test_what_was_recorded_is_what_the_server_says(
    stack: Stack, adapters: list[str], pytestconfig: pytest.Config
) -> None:
    """The tests that need no server hold the engine to these answers."""
    found = vllm_recorded.record(stack.vllm_url, stack.store.adapter(adapters[0]))
    if pytestconfig.getoption("--record"):
        vllm_recorded.FILE.write_text(json.dumps(found, indent=1) + "\n")
    recorded = json.loads(vllm_recorded.FILE.read_text())
    assert found.keys() == recorded.keys()
    for name, exchange in found.items():
        assert (name, exchange["status"], exchange["body"]) == (name, recorded[name]["status"], recorded[name]["body"])
