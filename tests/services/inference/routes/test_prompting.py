"""What requests say to the chat template: begun answers, variables, effort."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from services.inference.prompts import ChatSource, ids_of
from shared.datasets.chat_template import ChatTemplate
from shared.datasets.examples import Message
from shared.datasets.templates import InstructionTemplate
from shared.inference_api.ignored import IGNORED_PARAMETERS
from tests.services.inference.server import Server

CHAT = "/v1/chat/completions"
BEGUN: list[dict[str, Any]] = [
    {"role": "user", "content": "List two colours as JSON"},
    {"role": "assistant", "content": '{"colours":['},
]
START = "<|im_start|>user\nList two colours as JSON<|im_end|>\n<|im_start|>assistant\n"


def text_of(server: Server, messages: list[dict[str, Any]], **more: Any) -> str:
    answer = server.http.post(
        CHAT, json={"messages": messages, "max_tokens": 8, "ignore_eos": True, "temperature": 0} | more
    )
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def raw(server: Server, prompt: str) -> str:
    body = {"prompt": prompt, "max_tokens": 8, "ignore_eos": True, "temperature": 0}
    text: str = server.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    return text


@pytest.mark.parametrize(
    "flags", [{}, {"continue_final_message": True, "add_generation_prompt": False}, {"add_generation_prompt": False}]
)
def test_an_assistants_last_message_is_continued(server: Server, flags: dict[str, bool]) -> None:
    """Trial T31."""
    assert text_of(server, BEGUN, **flags) == raw(server, START + '{"colours":[')


@pytest.mark.parametrize("flags", [{"continue_final_message": False}, {"add_generation_prompt": True}])
def test_another_answer_begins_where_it_is_asked_for(server: Server, flags: dict[str, bool]) -> None:
    whole = START + '{"colours":[<|im_end|>\n<|im_start|>assistant\n'
    assert text_of(server, BEGUN, **flags) == raw(server, whole)


def test_begun_answers_go_on_in_an_adapters_own_format_and_on_generate(server: Server, adapters: list[str]) -> None:
    prompt = server.prompt(InstructionTemplate().instruction(BEGUN[0]["content"]).text)
    prompt += server.serving.tokenizer.encode(BEGUN[1]["content"], add_special_tokens=False)
    expected = server.tiny.oracle.ids(adapters[0], prompt, 8)
    assert server.ids(messages=BEGUN, parameters={"adapter_id": adapters[0], "max_new_tokens": 8}) == expected
    chat = server.prompt(START + BEGUN[1]["content"])
    assert server.ids(messages=BEGUN, parameters={"max_new_tokens": 8}) == server.tiny.oracle.ids(None, chat, 8)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"chat_template_kwargs": {"a": {"b": 1}}}, "chat_template_kwargs.a"),
        ({"chat_template_kwargs": {"a\r\nb: c": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"reasoning_effort": "some"}, "reasoning_effort"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server: Server, more: dict[str, Any], param: str) -> None:
    refused = server.http.post(CHAT, json={"messages": BEGUN[:1], "max_tokens": 4} | more)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert text_of(server, BEGUN[:1], chat_template_kwargs={}, reasoning_effort=None)


def test_what_the_template_has_no_switch_for_is_told(server: Server) -> None:
    body = {"messages": BEGUN[:1], "max_tokens": 1, "reasoning_effort": "low", "chat_template_kwargs": {"tone": "!"}}
    answer = server.http.post(CHAT, json=body)
    assert answer.headers[IGNORED_PARAMETERS] == "chat_template_kwargs.tone,reasoning_effort"


@pytest.fixture
def prompted(server: Server) -> Callable[..., Any]:
    tokenizer = server.serving.tokenizer
    source = "{{ messages[0].content }}{% if not enable_thinking | default(true) %} at once{% endif %}{{ tone }}"
    template = ChatTemplate(source, {}, tokenizer.control)

    async def text(**more: Any) -> str:
        return (await ids_of(ChatSource([Message("user", "hi")], **more), tokenizer, template))[0]

    return text


async def _texts(prompted: Callable[..., Any]) -> list[str]:
    return [
        await prompted(),
        await prompted(effort="none"),
        await prompted(effort="high"),
        await prompted(effort="none", variables={"enable_thinking": True, "tone": "!"}),
        await prompted(variables={"messages": [], "unknown": 1}),
    ]


def test_variables_and_effort_reach_the_template(prompted: Callable[..., Any]) -> None:
    assert asyncio.run(_texts(prompted)) == ["hi", "hi at once", "hi", "hi!", "hi"]
