"""The engine `vllm` beside a stand-in for the server that generates real tokens: it says what the own engine says."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.inference.adapters.weights import read_adapter
from services.inference.engine.admission import Admission
from services.inference.engine.base_shape import BaseShape
from services.inference.engine.grammar import Grammars, _followed
from services.inference.engine.interface import Cancelled, Failed, Finished, GenerationRequest, GrammarText, Sampling
from services.inference.engine.vllm_engine import AdapterFolder, VllmEngine
from services.inference.settings import VLLM_MAX_RANK, VLLM_SLOTS, InferenceSettings
from services.inference.vllm_server import MOST_RANK, SLOTS, command
from shared.errors import InvalidRequest, Unavailable
from tests.services.inference.harness import EngineUnderTest, Heard, Tiny, alike
from tests.services.inference.vllm_stand_in import VllmStandIn

LONG: dict[str, Any] = {"max_new_tokens": 200, "ignore_eos": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "to the length": {"ignore_eos": True},
    "alternatives": {"top_logprobs": 3},
    "one alternative": {"top_logprobs": 1},
    "sampled": {"sampling": Sampling(do_sample=True, temperature=1.3, top_k=40, top_p=0.9, min_p=0.01, seed=7)},
    "penalties": {"sampling": Sampling(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2)},
    "bias": {"sampling": Sampling(logit_bias=((11, 0.1), (12, -100.0)))},
    "prompt scores": {"prompt_logprobs": True, "prompt_top_logprobs": 2},
    "only reads": {"prompt_logprobs": True, "max_new_tokens": 0},
}


@pytest.fixture(scope="module")
def server(tiny: Tiny) -> Iterator[VllmStandIn]:
    with VllmStandIn(tiny) as running:
        yield running


class Beside:
    """An engine beside the stand-in, and how a test talks to it."""

    def __init__(self, tiny: Tiny, server: VllmStandIn, *, rows: int = 4, queue: int = 100) -> None:
        self.tiny, self.tokenizer = tiny, server.under_test.tokenizer
        self.shape = BaseShape.of(tiny.store.base(tiny.base.id))
        self.admission = Admission(requests=queue, tokens=100_000)
        self.engine = VllmEngine(
            server.url,
            server.base,
            self.tokenizer,
            self.admission,
            rows=rows,
            context=256,
            vocabulary=self.shape.vocabulary,
        )

    def load(self, uid: str, adapter: str | None = None) -> None:
        folder = self.tiny.store.adapter(adapter or uid)
        weights = read_adapter(folder, self.shape.lora_modules, max_rank=256)
        self.engine.load(uid, AdapterFolder(folder, weights.rank, weights.nbytes)).result(120)

    def submit(self, text: str, **options: Any) -> Heard:
        heard = Heard()
        prompt = self.tokenizer.encode(text, add_special_tokens=True)
        self.engine.submit(GenerationRequest(prompt, **options), heard)
        return heard

    def run(self, text: str, **options: Any) -> Heard:
        heard = self.submit(text, **options)
        assert isinstance(heard.last, Finished), heard.last
        return heard


@pytest.fixture
def beside(tiny: Tiny, server: VllmStandIn) -> Iterator[Callable[..., Beside]]:
    made: list[Beside] = []

    def make(**options: Any) -> Beside:
        made.append(Beside(tiny, server, **options))
        return made[-1]

    yield make
    for each in made:
        each.engine.close()


@pytest.fixture(scope="module")
def own(tiny: Tiny, adapters: list[str]) -> Iterator[EngineUnderTest]:
    under_test = EngineUnderTest(tiny)
    for adapter in adapters:
        under_test.load(adapter)
    yield under_test
    under_test.engine.close()


def eventually(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def said(heard: Heard) -> Any:
    """What was heard, times left out."""
    return heard.last, heard.tokens, heard.started.prompt_logprobs, heard.started.prompt_alternatives


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_base_and_adapters_say_what_the_own_engine_says(
    own: EngineUnderTest, beside: Callable[..., Beside], adapters: list[str], options: dict[str, Any]
) -> None:
    under_test = beside()
    options = {"max_new_tokens": 24} | options
    for adapter in adapters:
        under_test.load(adapter)
    for text in ("def f(x): return x", "What does json.dumps do?"):
        expected = [own.run(own.prompt(text), adapter=adapter, **options) for adapter in (None, *adapters)]
        heard = [under_test.submit(text, adapter=adapter, **options) for adapter in (None, *adapters)]
        assert alike([said(each) for each in heard], [said(each) for each in expected])
    assert len({each.text for each in expected}) > 1 or options.get("max_new_tokens") == 0


@pytest.mark.parametrize("keep", [True, False])
def test_stop_strings_are_found_here_and_the_server_is_told_to_stop(
    own: EngineUnderTest, beside: Callable[..., Beside], server: VllmStandIn, keep: bool
) -> None:
    whole = own.run(own.prompt("a"), **LONG)
    stop = whole.text[40:44]
    options = LONG | {"stop": (stop,), "keep_stop": keep}
    under_test = beside()
    heard, expected = under_test.run("a", **options), own.run(own.prompt("a"), **options)
    assert alike(said(heard), said(expected))
    assert heard.last == Finished("stop_sequence")
    eventually(lambda: not server.under_test.engine.stats().running)
    eventually(lambda: not under_test.engine.stats().running)


def test_a_grammar_is_followed(own: EngineUnderTest, beside: Callable[..., Beside]) -> None:
    grammars = Grammars(own.tokenizer, own.runner.vocabulary)
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    grammar = grammars._grammar(_followed(GrammarText("json_schema", json.dumps(schema))))
    heard = beside().run("a", grammar=grammar, max_new_tokens=60)
    assert json.loads(heard.text) in ({"a": 1}, {"a": 2})
    assert heard.last == Finished("eos_token")


def test_who_waits_is_counted_and_who_leaves_frees_the_place(
    beside: Callable[..., Beside], server: VllmStandIn
) -> None:
    under_test = beside(rows=2)
    server.hold.clear()
    try:
        first, second, third, fourth = [under_test.submit(f"{n}", **LONG) for n in range(4)]
        eventually(lambda: under_test.engine.stats().running == 2)
        stats = under_test.engine.stats()
        assert (stats.waiting, stats.batch_tokens > 400) == (2, True)
        handles = sorted(under_test.engine._running, key=lambda each: each.submitted_at)
        for handle in handles:
            under_test.engine.cancel(handle)
        assert [first.last, second.last] == [Cancelled(), Cancelled()]
        under_test.engine.cancel(handles[0])
    finally:
        server.hold.set()
    assert isinstance(third.last, Finished)
    assert isinstance(fourth.last, Finished)
    assert third.started.queue_seconds > 0
    eventually(lambda: under_test.engine.stats().running == 0)
    assert under_test.admission.requests == 0
    eventually(lambda: server.under_test.engine.stats().running == 0)


def test_a_full_queue_refuses_and_what_vllm_cannot_do_is_refused_by_name(beside: Callable[..., Beside]) -> None:
    under_test = beside()
    with pytest.raises(InvalidRequest) as refused:
        under_test.submit("a", sampling=Sampling(do_sample=True, typical_p=0.5))
    assert refused.value.param == "typical_p"
    with pytest.raises(InvalidRequest, match="vocabulary") as refused:
        under_test.submit("a", sampling=Sampling(logit_bias=((10**6, 1.0),)))
    assert refused.value.param == "logit_bias"
    with pytest.raises(InvalidRequest, match="maximum context length is 256"):
        under_test.submit("a", max_new_tokens=300)
    assert under_test.admission.requests == 0
    assert under_test.run("a").text


def test_a_server_that_was_started_anew_is_given_its_adapters_again(
    own: EngineUnderTest, beside: Callable[..., Beside], server: VllmStandIn, adapters: list[str]
) -> None:
    under_test = beside()
    for adapter in adapters[:2]:
        under_test.load(adapter)
    expected = [own.run(own.prompt("a"), adapter=adapter).ids for adapter in adapters[:2]]
    server.die()
    heard = under_test.submit("a")
    assert isinstance(heard.last, Failed)
    assert (heard.last.error.status, heard.last.error.code) == (503, "engine_unavailable")
    server.start()
    server.loads.clear()
    heard_all = [under_test.submit("a", adapter=adapter) for adapter in adapters[:2] * 4]
    assert [each.ids for each in heard_all if each.last] == expected * 4
    assert sorted(name.partition(".")[0] for name in server.loads) == sorted(adapters[:2])
    server.die()
    server.start()
    # Also where the prompt is read first.
    assert under_test.run("a", adapter=adapters[0], prompt_logprobs=True).ids == expected[0]
    # An adapter that nobody asked for meanwhile is let go all the same.
    under_test.engine.unload(adapters[1]).result(120)
    assert under_test.engine.stats().adapters == 1


def test_a_server_that_dies_in_mid_stream_fails_its_requests_and_no_others(
    beside: Callable[..., Beside], server: VllmStandIn
) -> None:
    under_test = beside()
    heard = [under_test.submit(f"{n}", **LONG) for n in range(4)]
    for each in heard:
        assert each.begun.wait(120)
    server.die()
    for each in heard:
        assert isinstance(each.last, Failed)
        assert each.last.error.code == "engine_unavailable"
    server.start()
    assert under_test.run("a").text
    eventually(lambda: (under_test.engine.stats().running, under_test.admission.requests) == (0, 0))


def test_each_load_has_a_name_of_its_own_and_those_of_an_earlier_life_are_let_go(
    beside: Callable[..., Beside], server: VllmStandIn, adapters: list[str]
) -> None:
    earlier = beside()
    earlier.load(f"{adapters[0]}@1", adapters[0])
    (name,) = [name for name in server.adapters if adapters[0] in name]
    # It ends without unloading: as if it were killed.
    earlier.engine.close()
    later = beside()
    eventually(lambda: name not in server.adapters)
    later.load(f"{adapters[0]}@1", adapters[0])
    assert name not in server.adapters
    assert [each.partition(".")[0] for each in server.adapters] == [f"{adapters[0]}@1"]
    later.engine.unload(f"{adapters[0]}@1").result(120)
    assert server.adapters == {}


def test_an_adapter_that_the_server_refuses_says_why(beside: Callable[..., Beside], tmp_path: Path) -> None:
    under_test = beside()
    with pytest.raises(InvalidRequest, match=r"adapter refused by vLLM: .*No adapter found") as refused:
        under_test.engine.load("a@1", AdapterFolder(tmp_path / "nowhere", 8, 1)).result(120)
    assert refused.value.code == "adapter_refused"
    assert under_test.engine.stats().adapters == 0
    assert under_test.run("a").text


def test_projects_share_nothing_in_the_cache(beside: Callable[..., Beside], server: VllmStandIn) -> None:
    under_test = beside()
    server.asked.clear()
    for scope in ("a", "b", ""):
        under_test.run("a", cache_scope=scope)
    assert [body["cache_salt"] for body in server.asked] == ["a", "b", "none"]


def test_closing_ends_everything_once(beside: Callable[..., Beside], server: VllmStandIn) -> None:
    under_test = beside(rows=1)
    heard = [under_test.submit(f"{n}", **LONG) for n in range(3)]
    assert heard[0].begun.wait(120)
    closing = [threading.Thread(target=under_test.engine.close) for _ in range(2)]
    for each in closing:
        each.start()
    for each in closing:
        each.join(60)
    for one in heard:
        assert isinstance(one.last, Failed)
        assert one.last.error.status == 503
    with pytest.raises(Unavailable):
        under_test.submit("a")
    with pytest.raises(Unavailable):
        under_test.engine.load("x", AdapterFolder(Path(), 1, 1)).result(120)
    assert under_test.admission.requests == 0


def test_the_servers_command_says_what_the_settings_say(tiny: Tiny) -> None:
    folder, settings = tiny.store.base(tiny.base.id), InferenceSettings(engine="vllm")
    words = command({"TUNESMITH_INFERENCE_BASE": "tiny"}, folder)
    given = dict(zip(words, [*words[1:], ""], strict=True))
    assert given["--port"] == settings.vllm_url.rpartition(":")[2]
    assert given["--max-num-seqs"] == SLOTS == str(VLLM_SLOTS)
    assert given["--max-cpu-loras"] == str(settings.adapter_slots)
    assert given["--max-lora-rank"] == MOST_RANK == str(VLLM_MAX_RANK) == str(settings.largest_rank)
    assert (given["--dtype"], given["--served-model-name"]) == ("bfloat16", "tiny")
    # The model's own limit is less.
    assert int(given["--max-model-len"]) == min(settings.context, BaseShape.of(folder).positions)
    own = {"BASE": "b", "CONTEXT": "128", "SLOTS": "3", "MAX_RANK": "20", "PRECISION": "fp32", "ADAPTER_SLOTS": "2"}
    environ = {f"TUNESMITH_INFERENCE_{name}": value for name, value in own.items()}
    words = command(environ | {"TUNESMITH_VLLM_ARGUMENTS": "--gpu-memory-utilization 0.5"}, folder)
    given = dict(zip(words, [*words[1:], ""], strict=True))
    assert (given["--max-lora-rank"], given["--max-loras"], given["--dtype"]) == ("32", "2", "float32")
    assert given["--gpu-memory-utilization"] == "0.5"
    with pytest.raises(SystemExit, match="PRECISION=int8"):
        command({"TUNESMITH_INFERENCE_PRECISION": "int8"}, folder)


def test_settings_that_vllm_cannot_serve_are_refused() -> None:
    for wrong in ({"vllm_url": "http://example.com:8000"}, {"vllm_url": "https://127.0.0.1:1"}, {"precision": "int8"}):
        given: dict[str, Any] = {"engine": "vllm", **wrong}
        with pytest.raises(ValueError, match=r"VLLM_URL|PRECISION"):
            InferenceSettings(**given)
    assert InferenceSettings(engine="own", precision="int8").largest_rank == 256
    assert InferenceSettings(engine="vllm", max_rank=128).largest_rank == 128
