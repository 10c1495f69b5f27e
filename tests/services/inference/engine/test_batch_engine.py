"""The engine against PEFT: what a row says never depends on who else is served."""

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from services.inference.engine import batch_engine
from services.inference.engine.interface import Cancelled, Failed, Finished, GenerationRequest, Sampling
from shared.errors import InvalidRequest, Overloaded, TunesmithError, Unavailable
from tests.services.inference.harness import EngineUnderTest, Heard, Tiny

MakeEngine = Callable[..., EngineUnderTest]
PROMPTS = [
    "def f(x): return x",
    "### Instruction:\nWhat does json.dumps do in Python?\n\n### Response:\n",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "äöü 你好 🎉",
    "a",
]


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "chunk"), [(1, 1000), (4, 16), (16, 5)])
def test_mixed_rows_say_what_peft_says(
    engine: MakeEngine, tiny: Tiny, adapters: list[str], rows: int, chunk: int
) -> None:
    """Base and adapters of all kinds, joining and leaving at random, in every size of batch."""
    under_test = engine(rows=rows, chunk=chunk)
    for adapter in adapters:
        under_test.load(adapter)
    chance = random.Random(rows)
    work: list[tuple[str | None, list[int], int]] = [
        (chance.choice([None, *adapters]), under_test.prompt(chance.choice(PROMPTS)), chance.randint(1, 24))
        for _ in range(40)
    ]
    heard = [under_test.submit(prompt, adapter=adapter, max_new_tokens=n) for adapter, prompt, n in work]
    for (served, prompt, n), each in zip(work, heard, strict=True):
        assert isinstance(each.last, Finished)
        assert each.ids == tiny.oracle.ids(served, prompt, n)
        assert each.text == under_test.tokenizer.decode(each.ids)


def test_adapters_differ(engine: MakeEngine, tiny: Tiny, adapters: list[str]) -> None:
    """The oracle itself tells the adapters apart; else equality would prove nothing."""
    prompt = engine().prompt(PROMPTS[0])
    assert len({tuple(tiny.oracle.ids(adapter, prompt, 20)) for adapter in [None, *adapters]}) == 1 + len(adapters)


def test_rows_that_leave_early_do_not_disturb_the_rest(engine: MakeEngine, tiny: Tiny, adapters: list[str]) -> None:
    under_test = engine(rows=6)
    under_test.load(adapters[0])
    under_test.load(adapters[2])
    chance = random.Random(7)
    kept: list[tuple[str | None, list[int], Heard]] = []
    for _ in range(25):
        adapter = chance.choice([adapters[0], adapters[2]])
        prompt = under_test.prompt(chance.choice(PROMPTS))
        heard = Heard()
        handle = under_test.engine.submit(GenerationRequest(prompt, adapter=adapter, max_new_tokens=20), heard)
        if chance.random() < 0.5:
            if chance.random() < 0.5:
                heard.begun.wait(120)
            under_test.engine.cancel(handle)
            assert isinstance(heard.last, Cancelled | Finished)
        else:
            kept.append((adapter, prompt, heard))
    for served, prompt, heard in kept:
        assert isinstance(heard.last, Finished)
        assert heard.ids == tiny.oracle.ids(served, prompt, 20)
    under_test.wait_until_idle()
    assert under_test.admission.requests == under_test.admission.tokens == 0


def test_a_slot_that_was_emptied_serves_its_next_adapter(engine: MakeEngine, tiny: Tiny, adapters: list[str]) -> None:
    """One slot for all: a bigger adapter leaves nothing behind for a smaller one."""
    under_test = engine(adapter_slots=1)
    prompt = under_test.prompt(PROMPTS[0])
    for adapter in [adapters[2], adapters[3], adapters[0], adapters[1]]:
        under_test.load(adapter)
        assert under_test.run(prompt, adapter=adapter, max_new_tokens=12).ids == tiny.oracle.ids(adapter, prompt, 12)
        under_test.engine.unload(adapter).result(120)
    assert under_test.run(prompt, max_new_tokens=12).ids == tiny.oracle.ids(None, prompt, 12)
    under_test.load(adapters[0])
    with pytest.raises(ValueError, match="no adapter slot"):
        under_test.load(adapters[1])


def test_an_adapter_that_is_not_loaded_fails_its_request_only(engine: MakeEngine, tiny: Tiny) -> None:
    under_test = engine()
    prompt = under_test.prompt(PROMPTS[0])
    failed = under_test.submit(prompt, adapter="adapter-unknown", max_new_tokens=3)
    assert isinstance(failed.last, Failed)
    assert under_test.run(prompt, max_new_tokens=3).ids == tiny.oracle.ids(None, prompt, 3)


def test_same_seed_same_text_whoever_else_is_there(engine: MakeEngine, adapters: list[str]) -> None:
    under_test = engine(rows=8)
    under_test.load(adapters[0])
    prompt = under_test.prompt(PROMPTS[0])
    sampling = Sampling(do_sample=True, temperature=1.5, top_k=50, top_p=0.95, seed=11)
    alone = under_test.run(prompt, adapter=adapters[0], max_new_tokens=20, sampling=sampling).ids
    crowd = [
        under_test.submit(
            under_test.prompt(text),
            max_new_tokens=25,
            sampling=Sampling(do_sample=True, temperature=1.2, seed=seed),
        )
        for seed, text in enumerate(PROMPTS)
    ]
    again = under_test.run(prompt, adapter=adapters[0], max_new_tokens=20, sampling=sampling).ids
    other = Sampling(do_sample=True, temperature=1.5, top_k=50, top_p=0.95, seed=12)
    assert again == alone
    assert under_test.run(prompt, adapter=adapters[0], max_new_tokens=20, sampling=other).ids != alone
    assert all(isinstance(each.last, Finished) for each in crowd)


def test_log_probabilities_are_the_models_own(engine: MakeEngine, tiny: Tiny) -> None:
    under_test = engine(chunk=4)
    prompt = under_test.prompt(PROMPTS[0])
    heard = under_test.run(prompt, max_new_tokens=6, prompt_logprobs=True, top_logprobs=3)
    with torch.no_grad():
        logits = tiny.load().model(torch.tensor([prompt + heard.ids])).logits[0].log_softmax(-1)
    everything = prompt + heard.ids
    expected = [float(logits[i, token]) for i, token in enumerate(everything[1:])]
    assert heard.started.prompt_logprobs == pytest.approx(expected[: len(prompt) - 1], abs=1e-4)
    assert [token.logprob for token in heard.tokens] == pytest.approx(expected[len(prompt) - 1 :], abs=1e-4)
    for token in heard.tokens:
        assert len(token.alternatives) == 3
        assert (token.alternatives[0].id, token.alternatives[0].logprob) == (token.id, token.logprob)


def test_stop_strings_end_the_text_across_token_borders(engine: MakeEngine) -> None:
    under_test = engine()
    prompt = under_test.prompt(PROMPTS[1])
    sampling = Sampling(do_sample=True, temperature=3.0, seed=3)
    whole = under_test.run(prompt, max_new_tokens=60, sampling=sampling)
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 4]
    end = whole.text.index(stop)
    for keep, expected in [(True, whole.text[: end + 4]), (False, whole.text[:end])]:
        heard = under_test.run(prompt, max_new_tokens=60, sampling=sampling, stop=("never", stop), keep_stop=keep)
        assert heard.text == expected
        assert heard.last == Finished("stop_sequence")
        assert heard.tokens[-1].finish == "stop_sequence"


def test_eos_ends_and_can_be_ignored(engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    under_test = engine()
    prompt = under_test.prompt(PROMPTS[0])
    eos = under_test.tokenizer.eos_id
    for name in ("prefill", "prefill_together", "decode"):
        forward = getattr(under_test.runner, name)

        def always_eos(*args: Any, forward: Callable[..., torch.Tensor] = forward, **options: Any) -> torch.Tensor:
            logits = torch.zeros_like(forward(*args, **options))
            logits[:, eos] = 1
            return logits

        monkeypatch.setattr(under_test.runner, name, always_eos)
    heard = under_test.run(prompt, max_new_tokens=5)
    assert (heard.ids, heard.text, heard.last) == ([eos], "", Finished("eos_token"))
    assert heard.tokens[0].special
    ignoring = under_test.run(prompt, max_new_tokens=5, ignore_eos=True)
    assert (ignoring.ids, ignoring.last) == ([eos] * 5, Finished("length"))


def test_the_queue_is_bounded_by_requests_and_tokens(engine: MakeEngine) -> None:
    under_test = engine(rows=1, queue_requests=2, queue_tokens=100)
    prompt = under_test.prompt(PROMPTS[0])
    running = under_test.submit(prompt, max_new_tokens=200, ignore_eos=True)
    running.begun.wait(120)
    waiting = [under_test.submit(prompt, max_new_tokens=2) for _ in range(2)]
    with pytest.raises(Overloaded):
        under_test.submit(prompt, max_new_tokens=2)
    for each in [running, *waiting]:
        assert isinstance(each.last, Finished)
    assert under_test.run(prompt, max_new_tokens=2).ids

    few = engine(rows=1, queue_tokens=30)
    running = few.submit(prompt, max_new_tokens=200, ignore_eos=True)
    running.begun.wait(120)
    few.submit(prompt[:5] * 4, max_new_tokens=1)
    with pytest.raises(Overloaded):
        few.submit(prompt[:5] * 4, max_new_tokens=1)


def test_a_cancelled_request_frees_its_row_within_a_step(engine: MakeEngine) -> None:
    under_test = engine(rows=1)
    prompt = under_test.prompt(PROMPTS[0])
    heard = Heard()
    handle = under_test.engine.submit(GenerationRequest(prompt, max_new_tokens=200, ignore_eos=True), heard)
    heard.begun.wait(120)
    under_test.engine.cancel(handle)
    said = len(heard.tokens)
    assert isinstance(heard.last, Cancelled)
    # The step in flight may still say one token; the next begins without it.
    assert len(heard.tokens) <= said + 1
    assert under_test.engine.stats().running == 0
    under_test.engine.cancel(handle)
    assert under_test.run(prompt, max_new_tokens=2).ids


@pytest.mark.parametrize(
    ("prompt_tokens", "new_tokens", "field"), [(0, 5, "inputs"), (256, 1, "inputs"), (250, 7, "max_new_tokens")]
)
def test_what_does_not_fit_the_context_is_refused(
    engine: MakeEngine, prompt_tokens: int, new_tokens: int, field: str
) -> None:
    under_test = engine(context=256)
    with pytest.raises(InvalidRequest) as refused:
        under_test.submit([5] * prompt_tokens, max_new_tokens=new_tokens)
    assert refused.value.param == field
    with pytest.raises(InvalidRequest):
        under_test.submit([1_000_000], max_new_tokens=1)
    assert under_test.admission.requests == 0


def test_the_whole_context_can_be_used(engine: MakeEngine, tiny: Tiny) -> None:
    under_test = engine(context=64, rows=2)
    prompt = (under_test.prompt(PROMPTS[2]) * 3)[:40]
    beside = under_test.submit(prompt[:3], max_new_tokens=61, ignore_eos=True)
    assert under_test.run(prompt, max_new_tokens=24).ids == tiny.oracle.ids(None, prompt, 24)
    assert isinstance(beside.last, Finished)


def test_one_broken_row_fails_alone(
    engine: MakeEngine, tiny: Tiny, adapters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward pass that raises whenever one certain row is in it."""
    under_test = engine(rows=4)
    under_test.load(adapters[0])
    under_test.load(adapters[1])
    forward = under_test.runner.decode
    poisoned = under_test.engine._slots[adapters[1]]

    def decode(first: int, ids: Any, positions: Any, slots: Any) -> torch.Tensor:
        if poisoned in slots and max(positions) > 20:
            raise RuntimeError("a kernel failed")
        return forward(first, ids, positions, slots)

    monkeypatch.setattr(under_test.runner, "decode", decode)
    prompt = under_test.prompt(PROMPTS[0])
    good = [under_test.submit(prompt, adapter=adapters[0], max_new_tokens=30) for _ in range(2)]
    bad = under_test.submit(prompt, adapter=adapters[1], max_new_tokens=30, ignore_eos=True)
    assert isinstance(bad.last, Failed)
    assert "kernel" not in bad.last.error.message
    for each in good:
        assert isinstance(each.last, Finished)
        assert each.ids == tiny.oracle.ids(adapters[0], prompt, 30)


def test_an_adapter_for_which_the_device_has_no_memory_is_refused_and_others_go_on(
    engine: MakeEngine, tiny: Tiny, adapters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    under_test = engine(rows=2)
    under_test.load(adapters[0])

    def no_memory(*_: Any) -> None:
        # A MOCK of a GPU that is full.
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(under_test.runner.lora, "write", no_memory)
        with pytest.raises(Overloaded, match="no memory for an adapter of rank"):
            under_test.load(adapters[1])
    assert under_test.engine.stats().adapters == 1
    under_test.load(adapters[1])
    prompt = under_test.prompt(PROMPTS[0])
    for adapter in adapters[:2]:
        assert under_test.run(prompt, adapter=adapter, max_new_tokens=12).ids == tiny.oracle.ids(adapter, prompt, 12)


@pytest.mark.parametrize("broken", [False, True])
def test_prompts_go_in_together_and_alone_if_that_fails(
    engine: MakeEngine, tiny: Tiny, adapters: list[str], monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    under_test = engine(rows=6, chunk=200)
    under_test.load(adapters[0])
    under_test.load(adapters[2])
    sizes: list[int] = []
    together = under_test.runner.prefill_together

    def count(pieces: Any) -> torch.Tensor:
        sizes.append(len(pieces))
        logits = together(pieces)
        if broken:
            raise RuntimeError("a kernel failed when everything was written")
        return logits

    monkeypatch.setattr(under_test.runner, "prefill_together", count)
    held = threading.Event()

    def wait() -> None:
        held.wait(120)

    hold = under_test.engine._between_steps(wait)
    work = [(adapter, under_test.prompt(text)) for text in PROMPTS for adapter in (None, adapters[0], adapters[2])]
    heard = [under_test.submit(prompt, adapter=adapter, max_new_tokens=9) for adapter, prompt in work]
    held.set()
    hold.result(120)
    for (served, prompt), each in zip(work, heard, strict=True):
        assert isinstance(each.last, Finished)
        assert each.ids == tiny.oracle.ids(served, prompt, 9)
    assert max(sizes) > 1


def test_a_step_that_fails_outside_of_any_request_does_not_end_the_engine(
    engine: MakeEngine, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_test = engine(rows=2)
    clear, broken = under_test.runner.cache.clear, [True]

    def once(row: int, length: int) -> None:
        if broken and broken.pop():
            raise RuntimeError("out of memory")
        clear(row, length)

    monkeypatch.setattr(under_test.runner.cache, "clear", once)
    prompt = under_test.prompt(PROMPTS[0])
    short = under_test.submit(prompt, max_new_tokens=3)
    long = under_test.submit(prompt, max_new_tokens=100, ignore_eos=True)
    waiting = under_test.submit(prompt, max_new_tokens=8)
    assert isinstance(short.last, Finished)
    assert isinstance(long.last, Failed)
    assert isinstance(waiting.last, Finished)
    assert waiting.ids == tiny.oracle.ids(None, prompt, 8)


def test_a_lost_device_fails_everyone_at_once_and_says_so(engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    under_test = engine(rows=1)
    told = threading.Event()

    def illegal_access(*_: object, **__: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(under_test.engine, "_on_device_lost", told.set)
    monkeypatch.setattr(batch_engine, "device_answers", lambda _: False)
    prompt = under_test.prompt(PROMPTS[0])
    running = under_test.submit(prompt, max_new_tokens=200, ignore_eos=True)
    waiting = under_test.submit(prompt, max_new_tokens=3)
    assert running.begun.wait(120)
    monkeypatch.setattr(under_test.runner, "decode", illegal_access)
    monkeypatch.setattr(under_test.runner.cache, "clear", illegal_access)
    for heard in (running, waiting):
        assert isinstance(heard.last, Failed)
    assert told.wait(120)
    with pytest.raises(Unavailable):
        under_test.submit(prompt, max_new_tokens=1)


def test_non_finite_scores_fail_their_row_and_leave_nothing_behind(engine: MakeEngine, tiny: Tiny) -> None:
    """Finite weights can overflow; the next sequence of the row must not inherit NaN through masked positions."""
    huge = tiny.adapter(seed=9, r=8, alpha=1, scale=1e30)
    under_test = engine(rows=1)
    under_test.load(huge)
    prompt = under_test.prompt(PROMPTS[2])
    failed = under_test.submit(prompt, adapter=huge, max_new_tokens=5)
    assert isinstance(failed.last, Failed)
    assert failed.last.error.code == "non_finite"
    short = under_test.prompt("a")
    assert under_test.run(short, max_new_tokens=12).ids == tiny.oracle.ids(None, short, 12)


def test_closing_fails_what_is_left(engine: MakeEngine) -> None:
    under_test = engine(rows=1)
    prompt = under_test.prompt(PROMPTS[0])
    heard = [under_test.submit(prompt, max_new_tokens=200, ignore_eos=True) for _ in range(3)]
    heard[0].begun.wait(120)
    under_test.engine.close()
    for each in heard:
        assert isinstance(each.last, Failed)
        assert isinstance(each.last.error, Unavailable)
    with pytest.raises(Unavailable):
        under_test.submit(prompt, max_new_tokens=1)
    with pytest.raises(TunesmithError):
        under_test.engine.unload("x").result(60)
