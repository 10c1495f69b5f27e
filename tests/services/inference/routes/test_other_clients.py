"""What clients made for OpenAI, vLLM, text-generation-inference and llama.cpp send, on the real application."""

from typing import Any

import pytest
from openai import OpenAI

from shared.inference_api.ignored import IGNORED_PARAMETERS
from tests.services.inference.harness import Tiny
from tests.services.inference.server import Server, running

PROMPT = "def f(x): return x"
USER: dict[str, Any] = {"role": "user", "content": "hello"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "b"}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def chat(server: Server, *messages: dict[str, Any], **more: Any) -> Any:
    body = {"messages": [*messages], "max_tokens": 5, "temperature": 0} | more
    answer = server.http.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    return answer


def test_an_answer_comes_back_as_history(client: OpenAI) -> None:
    """The loop of OpenAI's own examples: the message object itself is appended."""
    messages: list[Any] = [USER]
    for _ in range(3):
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5)
        messages += [answer.choices[0].message, USER]
    dumped: list[Any] = [each if isinstance(each, dict) else each.model_dump() for each in messages]
    client.chat.completions.create(model="tiny", messages=dumped, max_tokens=5)


STORED = [
    {"refusal": None},
    {"tool_calls": None},
    {"function_call": None},
    {"audio": None},
    {"annotations": []},
    {"tool_calls": [], "opts": {}},
    {"refusal": None, "tool_calls": None, "function_call": None, "audio": None, "annotations": None, "name": None},
    {"invented_by_a_front_end": None},
]
KEPT = [
    {"weight": 1},
    {"id": "msg-1", "opts": {"a": 1}},
    {"reasoning": "so", "reasoning_content": "so"},
    {"name": "Al"},
]


@pytest.mark.parametrize("extra", [*STORED, *KEPT], ids=str)
def test_stored_messages_are_taken_and_change_nothing(server: Server, extra: dict[str, Any]) -> None:
    plain = chat(server, USER, ANSWER, USER)
    stored = chat(server, USER, ANSWER | extra, USER)
    assert stored.json()["choices"] == plain.json()["choices"]
    assert stored.json()["usage"] == plain.json()["usage"]
    named = [f"messages.{name}" for name in sorted(extra)] if extra in KEPT else []
    assert stored.headers.get(IGNORED_PARAMETERS, "") == ",".join(named)
    ids = server.ids(messages=[USER, ANSWER, USER], parameters={"max_new_tokens": 5})
    assert server.ids(messages=[USER, ANSWER | extra, USER], parameters={"max_new_tokens": 5}) == ids


def test_an_assistant_without_content_has_said_nothing_or_its_refusal(server: Server) -> None:
    unsaid: list[dict[str, Any]] = [{"content": None}, {"content": ""}, {"content": []}, {}]
    usage = [chat(server, USER, {"role": "assistant"} | content, USER).json()["usage"] for content in unsaid]
    assert usage.count(usage[0]) == 4
    spoken = chat(server, USER, {"role": "assistant", "content": "No."}, USER).json()
    parts = [{"type": "refusal", "refusal": "No."}]
    refusals: list[dict[str, Any]] = [{"content": None, "refusal": "No."}, {"content": parts}]
    for refused in refusals:
        answer = chat(server, USER, {"role": "assistant"} | refused, USER).json()
        assert (answer["usage"], answer["choices"]) == (spoken["usage"], spoken["choices"])


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([USER, ANSWER | {"tool_calls": [{"id": "c"}]}, USER], "messages.1.tool_calls.0.function"),
        ([USER, ANSWER | {"function_call": {"name": "f"}}, USER], "messages.1.function_call"),
        ([USER, ANSWER | {"audio": {"id": "a"}}, USER], "messages.1.audio"),
        ([USER, ANSWER | {"invented": 1}, USER], "messages.1.invented"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages.0.content.0.type",
        ),
    ],
)
def test_what_a_message_means_is_not_passed_over(server: Server, messages: list[Any], param: str) -> None:
    answer = server.http.post(CHAT, json={"messages": messages, "max_tokens": 1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert server.generate(messages=messages).status_code == 422


HARMLESS: list[tuple[dict[str, Any], str]] = [
    ({"prompt_cache_key": "s1"}, "prompt_cache_key"),
    ({"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
    ({"service_tier": "auto"}, "service_tier"),
    ({"safety_identifier": "u1", "prompt_cache_key": "s"}, "prompt_cache_key,safety_identifier"),
    ({"verbosity": "medium"}, "verbosity"),
    ({"store": True}, "store"),
    ({"store": False, "metadata": {"a": "b"}, "user": "me"}, "metadata,store,user"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"parallel_tool_calls": True}, ""),
    ({"cache_prompt": True, "mirostat": 0, "mirostat_tau": 5.0}, "cache_prompt,mirostat_tau"),
    ({"keep_alive": "5m"}, "keep_alive"),
    ({"modalities": ["text"], "audio": None, "web_search_options": None}, ""),
    ({"tool_choice": "none"}, ""),
    ({"tool_choice": "auto", "tools": []}, ""),
    ({"functions": [], "function_call": "none"}, ""),
    ({"use_beam_search": False, "length_penalty": 1.0, "skip_special_tokens": True, "min_tokens": 0}, ""),
    ({"guided_json": None, "stop_token_ids": [], "echo": False}, ""),
    ({"repeat_penalty": 1.0, "typical_p": None, "tfs_z": 1.0, "dynatemp_range": 0, "xtc_probability": 0}, ""),
    (dict.fromkeys(["temperature", "top_p", "top_k", "n", "stop", "stream", "model", "seed", "invented"]), ""),
]


@pytest.mark.parametrize(("fields", "named"), HARMLESS, ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_harmless_fields_are_taken_and_named(server: Server, fields: dict[str, Any], named: str, stream: bool) -> None:
    body = {"messages": [USER], "max_tokens": 5, "seed": 1} | fields
    if stream:
        body["stream"] = True
    answer = server.http.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers.get(IGNORED_PARAMETERS, "") == named
    if not stream and "seed" not in fields:
        plain = server.http.post(CHAT, json={"messages": [USER], "max_tokens": 5, "seed": 1})
        assert answer.json()["choices"] == plain.json()["choices"]


def test_stream_options_of_other_servers(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    answer = chat(server, USER, stream=True, stream_options=options)
    named = "stream_options.continuous_usage_stats,stream_options.include_obfuscation"
    assert answer.headers[IGNORED_PARAMETERS] == named
    assert '"usage"' in answer.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"guided_regex": "a+"}, "guided_regex"),
        ({"repeat_penalty": 1.1, "repeat_last_n": 64}, "repeat_last_n"),
        ({"n_predict": 5}, "n_predict"),
        ({"options": {"num_ctx": 4096}}, "options"),
        ({"surprise": 1}, "surprise"),
        ({"stream_options": {"surprise": 1}}, "stream_options.surprise"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(server: Server, fields: dict[str, Any], param: str) -> None:
    answer = server.http.post(CHAT, json={"messages": [USER], "max_tokens": 5} | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize(
    "greedy",
    [
        {"temperature": 0},
        {"temperature": 1e-9},
        {"temperature": 0, "top_p": 0},
        {"temperature": 1, "top_p": 0},
        {"temperature": 0, "top_k": -1},
        {"temperature": 0, "top_k": 0},
        {"temperature": 0, "top_p": 1, "repetition_penalty": 1.0},
    ],
    ids=str,
)
def test_zero_is_greedy_on_every_route(server: Server, greedy: dict[str, Any]) -> None:
    expected = server.tiny.oracle.ids(None, server.prompt(PROMPT), 12)
    assert server.ids(inputs=PROMPT, parameters=greedy | {"max_new_tokens": 12}) == expected
    sampled = {"do_sample": True, "max_new_tokens": 12}
    assert server.ids(inputs=PROMPT, parameters=greedy | sampled) == expected
    text = server.serving.tokenizer.decode(expected)
    body = {"prompt": PROMPT, "max_tokens": 12} | greedy
    assert server.http.post(COMPLETIONS, json=body).json()["choices"][0]["text"] == text


@pytest.mark.parametrize("off", [0, -1, None])
def test_top_k_is_switched_off(server: Server, off: int | None) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "seed": 5, "temperature": 2}
    unset = server.http.post(COMPLETIONS, json=body).json()["choices"]
    assert server.http.post(COMPLETIONS, json=body | {"top_k": off}).json()["choices"] == unset
    assert server.http.post(COMPLETIONS, json=body | {"top_k": 1}).json()["choices"] != unset
    parameters = {"max_new_tokens": 12, "seed": 5, "temperature": 2.0}
    ids = server.ids(inputs=PROMPT, parameters=parameters)
    assert server.ids(inputs=PROMPT, parameters=parameters | {"top_k": off}) == ids


def test_any_number_of_stop_strings_and_empty_ones(server: Server) -> None:
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    whole = server.http.post(COMPLETIONS, json=body).json()["choices"][0]["text"]
    stop = whole[len(whole) // 2 :][:3]
    cut = whole[: whole.index(stop)]
    for nothing in ("", [], [""], None, ["never in it", ""]):
        assert server.http.post(COMPLETIONS, json=body | {"stop": nothing}).json()["choices"][0]["text"] == whole
    many = [f"<|absent-{n}|>" for n in range(200)]
    for stops in ([*many, stop, ""], ["", stop], stop, [stop] * 9):
        assert server.http.post(COMPLETIONS, json=body | {"stop": stops}).json()["choices"][0]["text"] == cut
    kept = server.http.post(COMPLETIONS, json=body | {"stop": stop, "include_stop_str_in_output": True}).json()
    assert kept["choices"][0]["text"] == cut + stop
    parameters = {"max_new_tokens": 30, "stop": [*many, "", stop]}
    assert server.generate(inputs=PROMPT, parameters=parameters).json()["generated_text"] == cut + stop
    older = {"max_new_tokens": 30, "stop_sequences": [stop]}
    assert server.generate(inputs=PROMPT, parameters=older).json()["generated_text"] == cut + stop


def test_only_so_many_of_the_prompts_last_tokens(server: Server) -> None:
    expected = server.tiny.oracle.ids(None, server.prompt(PROMPT)[-3:], 6)
    body = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "truncate_prompt_tokens": 3}
    answer = server.http.post(COMPLETIONS, json=body).json()
    assert answer["choices"][0]["text"] == server.serving.tokenizer.decode(expected)
    assert answer["usage"]["prompt_tokens"] == 3


def test_llama_cpps_penalty_is_the_repetition_penalty(server: Server) -> None:
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    texts = [
        server.http.post(COMPLETIONS, json=body | more).json()["choices"][0]["text"]
        for more in ({"repeat_penalty": 100}, {"repetition_penalty": 100}, {})
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("stream", [False, True])
def test_more_new_tokens_than_fit_are_cut_to_what_does(server: Server, stream: bool) -> None:
    """A client's fixed large limit; the context of this server is 256."""
    context = server.serving.engine.context
    long = [{"role": "user", "content": "zq " * 75}]
    for field in ("max_tokens", "max_completion_tokens"):
        body = {"messages": long, field: 4096, "temperature": 0, "ignore_eos": True, "stream": stream}
        answer = server.http.post(CHAT, json=body | {"stream_options": {"include_usage": True}})
        assert answer.status_code == 200, answer.text
        assert f'"total_tokens":{context}' in answer.text
        assert '"finish_reason":"length"' in answer.text
    parameters = {"max_new_tokens": 4096, "ignore_eos_token": True, "details": True}
    details = server.generate(inputs="zq " * 75, parameters=parameters).json()["details"]
    assert details["generated_tokens"] + details["input_length"] == context
    assert details["finish_reason"] == "length"
    body = {"prompt": "zq " * 75, "max_tokens": 2**31, "ignore_eos": True}
    assert server.http.post(COMPLETIONS, json=body).json()["usage"]["total_tokens"] == context


def test_a_setting_refuses_more_new_tokens_than_fit(tiny: Tiny) -> None:
    with running(tiny, beyond_context="refuse") as server:
        context = server.serving.engine.context
        answer = server.http.post(CHAT, json={"messages": [USER], "max_tokens": 4096})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, "max_tokens", "context_length_exceeded")
        assert f"maximum context length is {context}" in error["message"]
        assert "4096" in error["message"]
        refused = server.generate(inputs="a", parameters={"max_new_tokens": 4096})
        assert (refused.status_code, "max_new_tokens" in refused.json()["error"]) == (422, True)
        assert chat(server, USER).json()["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("words", [300, 3000])
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_has_openais_code_and_both_numbers(server: Server, words: int, stream: bool) -> None:
    """What LiteLLM and others look for to fall back to a longer context; what is far too long is only estimated."""
    context = server.serving.engine.context
    text = "zq " * words
    for path, body, param in (
        (CHAT, {"messages": [{"role": "user", "content": text}]}, "messages"),
        (COMPLETIONS, {"prompt": text}, "prompt"),
    ):
        answer = server.http.post(path, json=body | {"max_tokens": 10, "stream": stream})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
        assert f"maximum context length is {context} tokens" in error["message"]
        numbers = [int(word) for word in error["message"].split() if word.isdigit()]
        assert len(numbers) == 2
        assert numbers[1] > context
    refused = server.generate(inputs=text)
    assert (refused.status_code, "maximum context length" in refused.json()["error"]) == (422, True)
