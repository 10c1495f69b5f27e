"""Several prompts, several choices, penalties, echo: what a client asks for in one request is what it gets."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from services.inference.generation import derived_seed
from shared.inference_api.fields import MAX_CANDIDATES, MAX_PROMPTS
from tests.services.inference.routes.test_disconnects import connect, wait
from tests.services.inference.routes.test_http import PROMPT, events_of
from tests.services.inference.server import Server

MESSAGES = [{"role": "user", "content": "hello"}]


def complete(server: Server, **body: Any) -> Any:
    answer = server.http.post("/v1/completions", json={"max_tokens": 8, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat(server: Server, **body: Any) -> Any:
    answer = server.http.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 8, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def texts(answer: Any) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in answer["choices"]]


def test_n_choices_differ_and_follow_from_the_seed(server: Server) -> None:
    first = texts(chat(server, n=4, seed=3))
    assert len(set(first)) == 4
    assert texts(chat(server, n=4, seed=3)) == first
    # The first choice is what the seed gives alone, and more choices do not change the first ones.
    assert texts(chat(server, seed=3)) == first[:1]
    assert texts(chat(server, n=2, seed=3)) == first[:2]
    assert texts(chat(server, seed=derived_seed(3, 0, 1))) == first[1:2]
    assert texts(chat(server, n=4, seed=4)) != first
    usage = chat(server, n=4, seed=3)["usage"]
    one = chat(server, seed=3)["usage"]
    assert usage["prompt_tokens"] == one["prompt_tokens"]
    assert usage["completion_tokens"] > one["completion_tokens"]
    assert len(set(texts(chat(server, n=3)))) == 3


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_streamed_choices_carry_their_index(server: Server, kind: str) -> None:
    path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    body: dict[str, Any] = {"messages": MESSAGES} if kind == "chat" else {"prompt": [PROMPT, "a"]}
    body |= {"n": 3, "seed": 5, "max_tokens": 8}
    whole = server.http.post(path, json=body).json()
    stream = server.http.post(path, json=body | {"stream": True, "stream_options": {"include_usage": True}})
    assert stream.text.endswith("data: [DONE]\n\n")
    *chunks, usage = events_of(stream.text)
    assert usage["usage"] == whole["usage"]
    for place, (choice, text) in enumerate(zip(whole["choices"], texts(whole), strict=True)):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == place]
        pieces = [each["text"] if kind == "completion" else each["delta"].get("content", "") for each in own]
        assert "".join(pieces) == text
        assert [each["finish_reason"] for each in own if each["finish_reason"]] == [choice["finish_reason"]]
    assert len(whole["choices"]) == (3 if kind == "chat" else 6)


def test_several_prompts_are_answered_as_if_alone(server: Server, adapters: list[str]) -> None:
    prompts = [PROMPT, "a", "The quick brown fox"]
    for options in ({"temperature": 0}, {"temperature": 1.2, "seed": 8}, {"model": adapters[1], "temperature": 0}):
        alone = [text for prompt in prompts for text in texts(complete(server, prompt=prompt, **options))]
        together = complete(server, prompt=prompts, **options)
        assert texts(together) == alone
        by_ids = [server.prompt(prompt) for prompt in prompts]
        assert texts(complete(server, prompt=by_ids, **options)) == alone
        assert together["usage"]["prompt_tokens"] == sum(map(len, by_ids))
    assert texts(complete(server, prompt=[PROMPT], temperature=0)) == texts(
        complete(server, prompt=PROMPT, temperature=0)
    )
    # Without a seed, equal prompts are no reason for equal answers.
    assert len(set(texts(complete(server, prompt=[PROMPT] * 3, temperature=1.5)))) == 3


def test_prompts_with_n_come_prompt_by_prompt(server: Server) -> None:
    answer = texts(complete(server, prompt=[PROMPT, "a"], n=2, seed=6))
    assert answer[:2] == texts(complete(server, prompt=PROMPT, n=2, seed=6))
    assert answer[2:] == texts(complete(server, prompt="a", n=2, seed=6))


def test_best_of_returns_the_likeliest(server: Server) -> None:
    everything = complete(server, prompt=PROMPT, n=6, best_of=6, seed=9, logprobs=0)
    means = {
        choice["text"]: sum(choice["logprobs"]["token_logprobs"]) / len(choice["logprobs"]["token_logprobs"])
        for choice in everything["choices"]
    }
    likeliest = sorted(means, key=lambda text: -means[text])
    best = complete(server, prompt=PROMPT, n=2, best_of=6, seed=9)
    assert texts(best) == likeliest[:2]
    assert best["usage"] == everything["usage"]


def test_tgis_best_of(server: Server) -> None:
    parameters = {"best_of": 4, "do_sample": True, "seed": 2, "max_new_tokens": 8, "details": True}
    answer = server.generate(inputs=PROMPT, parameters=parameters).json()
    best = answer["details"]
    others = best["best_of_sequences"]
    assert len(others) == 3
    assert len({answer["generated_text"], *(other["generated_text"] for other in others)}) == 4

    def mean(sequence: Any) -> float:
        return float(sum(token["logprob"] for token in sequence["tokens"]) / len(sequence["tokens"]))

    assert all(mean(best) >= mean(other) for other in others)
    # Each can be had again by its seed.
    again = {"do_sample": True, "seed": others[0]["seed"], "max_new_tokens": 8}
    assert server.generate(inputs=PROMPT, parameters=again).json()["generated_text"] == others[0]["generated_text"]
    assert "best_of_sequences" not in server.generate(inputs=PROMPT, parameters=again | {"details": True}).text
    streamed = server.http.post("/generate_stream", json={"inputs": PROMPT, "parameters": parameters})
    assert streamed.status_code == 422
    assert "best is known" in streamed.text


def test_echo_reads_the_prompt(server: Server) -> None:
    """What lm-eval's loglikelihood reads: log probabilities of the prompt's tokens, from one forward pass."""
    ids = server.prompt(PROMPT)
    answer = complete(server, prompt=[ids, ids], echo=True, max_tokens=0, logprobs=2)
    assert complete(server, prompt=[PROMPT] * 2, echo=True, max_tokens=0, logprobs=2)["choices"] == answer["choices"]
    with torch.no_grad():
        logprobs = server.tiny.load().model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for choice in answer["choices"]:
        told = choice["logprobs"]
        assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
        assert told["token_logprobs"][0] is None
        assert told["top_logprobs"][0] is None
        expected = [float(logprobs[place, token]) for place, token in enumerate(ids[1:])]
        assert told["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
        assert "".join(told["tokens"]) == PROMPT
        assert [
            PROMPT[a:b] for a, b in zip(told["text_offset"], [*told["text_offset"][1:], None], strict=True)
        ] == told["tokens"]
        for place, top in enumerate(told["top_logprobs"][1:]):
            assert max(top.values()) == pytest.approx(float(logprobs[place].max()), abs=1e-4)
            # Equal to the bit: whoever asks whether the prompt is the greedy text compares them so.
            name = told["tokens"][place + 1]
            assert name not in top or top[name] == told["token_logprobs"][place + 1]
    assert answer["usage"] == {"prompt_tokens": 2 * len(ids), "completion_tokens": 0, "total_tokens": 2 * len(ids)}


def test_echo_goes_on_into_the_answer(server: Server) -> None:
    plain = complete(server, prompt=PROMPT, temperature=0, logprobs=1)["choices"][0]
    body = {"prompt": PROMPT, "temperature": 0, "logprobs": 1, "echo": True, "max_tokens": 8}
    whole = complete(server, **body)["choices"][0]
    assert whole["text"] == PROMPT + plain["text"]
    told, alone = whole["logprobs"], plain["logprobs"]
    count = len(alone["tokens"])
    assert told["tokens"][-count:] == alone["tokens"]
    assert told["token_logprobs"][-count:] == pytest.approx(alone["token_logprobs"], abs=1e-5)
    assert told["text_offset"][-count:] == [len(PROMPT) + offset for offset in alone["text_offset"]]
    chunks = events_of(server.http.post("/v1/completions", json=body | {"stream": True}).text)
    pieces = [chunk["choices"][0] for chunk in chunks]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    for key in ("tokens", "text_offset"):
        assert [each for piece in pieces for each in piece["logprobs"][key]] == told[key]
    read = {"prompt": PROMPT, "max_tokens": 0, "echo": True, "stream": True}
    chunks = events_of(server.http.post("/v1/completions", json=read).text)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == [PROMPT, ""]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_nothing_is_generated_for_max_tokens_0(server: Server) -> None:
    answer = complete(server, prompt=PROMPT, max_tokens=0)
    assert (texts(answer), answer["usage"]["completion_tokens"]) == ([""], 0)
    fits = complete(server, prompt=[5] * 256, max_tokens=0, echo=True, logprobs=0)
    assert len(fits["choices"][0]["logprobs"]["tokens"]) == 256
    assert server.http.post("/v1/completions", json={"prompt": [5] * 257, "max_tokens": 0}).status_code == 400


def test_an_empty_prompt_begins_a_text(server: Server) -> None:
    begin = server.serving.tokenizer.begin_id
    assert server.serving.tokenizer.decode([begin], skip_special_tokens=False) == "<|im_start|>"
    expected = server.tiny.oracle.ids(None, [begin], 8)
    assert server.ids(inputs="", parameters={"max_new_tokens": 8}) == expected
    answer = complete(server, prompt=["", PROMPT], temperature=0, echo=True)
    assert texts(answer)[0] == server.serving.tokenizer.decode(expected)


def test_penalties_and_bias_change_the_answer(server: Server) -> None:
    plain = server.ids(inputs=PROMPT, parameters={"max_new_tokens": 30, "ignore_eos_token": True})
    parameters = {"max_new_tokens": 30, "ignore_eos_token": True, "frequency_penalty": 2}
    penalised = server.ids(inputs=PROMPT, parameters=parameters)
    assert len(set(penalised)) > len(set(plain))
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 30, "ignore_eos": True}
    text = texts(complete(server, **body))
    assert texts(complete(server, **body, frequency_penalty=2)) == [server.serving.tokenizer.decode(penalised)]
    assert texts(complete(server, **body, presence_penalty=2)) != text
    assert texts(complete(server, **body, frequency_penalty=0, presence_penalty=0, logit_bias={}, min_p=0)) == text
    letter = server.serving.tokenizer.encode("x", add_special_tokens=False)[0]
    assert texts(complete(server, **body, logit_bias={str(letter): 100})) == ["x" * 30]
    assert texts(complete(server, **body, logit_bias={str(letter): -100})) == [text[0]] or "x" in text[0]
    answer = server.http.post("/v1/chat/completions", json={"messages": MESSAGES, "logit_bias": {"399999": 1}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logit_bias")


def test_narrow_samples_are_greedy(server: Server) -> None:
    """Of what min_p = 1 leaves there is only the best; LangChain's typical_p of 0.95 is taken and samples."""
    greedy = texts(complete(server, prompt=PROMPT, temperature=0))
    assert texts(complete(server, prompt=PROMPT, temperature=2, min_p=1)) == greedy
    parameters = {"typical_p": 0.95, "max_new_tokens": 20, "seed": 4}
    sampled = server.ids(inputs=PROMPT, parameters=parameters)
    assert sampled == server.ids(inputs=PROMPT, parameters=parameters)
    assert sampled != server.ids(inputs=PROMPT, parameters=parameters | {"do_sample": False})


def test_bytes_of_log_probabilities_rebuild_the_text(server: Server) -> None:
    """Random text of a byte-level model is full of halves of characters."""
    halves = 0
    for seed in range(8):
        answer = chat(server, seed=seed, temperature=2, max_tokens=40, logprobs=True, top_logprobs=2)["choices"][0]
        content = answer["logprobs"]["content"]
        joined = bytes(byte for token in content for byte in token["bytes"])
        assert joined.decode(errors="replace") == answer["message"]["content"]
        for token in content:
            named = token["token"].encode()
            assert bytes(token["bytes"]) in (b"", named) or token["token"].startswith("\\x")
            halves += token["token"].startswith("\\x")
    assert halves > 5


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": ["a"] * (MAX_PROMPTS + 1)}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": "a", "n": MAX_CANDIDATES + 1}, "n"),
        ({"prompt": "a", "n": 3, "best_of": 2}, None),
        ({"prompt": "a", "best_of": 2, "stream": True}, None),
        ({"prompt": ["a"] * 20, "n": 16}, None),
        ({"prompt": "a", "presence_penalty": 2.1}, "presence_penalty"),
        ({"prompt": "a", "frequency_penalty": -3}, "frequency_penalty"),
        ({"prompt": "a", "logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"prompt": "a", "logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias"),
        ({"prompt": "a", "min_p": 2}, "min_p"),
        ({"prompt": ["a", "abc " * 400]}, "prompt"),
        ({"prompt": [[1, 2], [100000]]}, "prompt"),
    ],
)
def test_what_is_out_of_bounds_is_refused(server: Server, body: dict[str, Any], field: str | None) -> None:
    answer = server.http.post("/v1/completions", json={"max_tokens": 2, **body})
    assert answer.status_code == 400
    param = answer.json()["error"]["param"]
    assert param == field or (field is not None and param.startswith(field)), answer.text
    server.wait_until_idle()
    assert texts(complete(server, prompt="a", max_tokens=1))


def test_all_choices_of_a_client_that_leaves_are_cancelled(server: Server, adapters: list[str]) -> None:
    engine = server.serving.engine
    server.wait_until_idle()
    before = engine.stats().tokens
    body = {"model": adapters[0], "prompt": ["a", "b"], "n": 8, "max_tokens": 240, "ignore_eos": True, "seed": 1}
    for stream in (False, True):
        leaving: socket.socket = connect(server, "/v1/completions", body | {"stream": stream})
        # Four rows run, twelve wait.
        wait(lambda: engine.stats().running == 4 and engine.stats().waiting == 12)
        leaving.close()
        server.wait_until_idle()
    assert engine.stats().tokens - before < 2 * 16 * 240
    assert texts(complete(server, prompt="a", max_tokens=1))


def test_choices_beside_other_clients_are_the_same(server: Server, adapters: list[str]) -> None:
    """Sixteen candidates over four rows, other requests of every kind in between."""
    body = {"prompt": PROMPT, "n": 4, "seed": 11, "temperature": 1.3, "presence_penalty": 0.6, "max_tokens": 24}
    alone = texts(complete(server, **body))
    over = threading.Event()

    def crowd(place: int) -> int:
        count = 0
        while not over.is_set():
            model = [None, *adapters][place % 5] or ""
            complete(server, model=model, prompt="a b c"[:place], max_tokens=10 + place, frequency_penalty=0.5)
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(crowd, place) for place in range(1, 5)]
        try:
            together = [texts(complete(server, **body)) for _ in range(5)]
        finally:
            over.set()
        assert all(other.result() > 0 for other in others)
    assert together == [alone] * 5
