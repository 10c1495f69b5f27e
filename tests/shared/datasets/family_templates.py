"""Chat templates with the traits of the families that people use; every text is written here, none is a model's own."""

from collections.abc import Callable
from dataclasses import dataclass, field

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from tests.shared.datasets.family_tokenizers import byte_level, sentencepiece_bpe

LLAMA_3 = """
{{- bos_token }}
{%- if strftime_now is defined %}{% set today = strftime_now("%d %b %Y") %}
{%- else %}{% set today = "1 Jan 2025" %}{% endif %}
{%- if messages[0].role == "system" %}
    {%- set told = messages[0].content | trim %}{% set rest = messages[1:] %}
{%- else %}
    {%- set told = "" %}{% set rest = messages %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nThe day is " + today + "\n\n" + told }}
{%- if tools is not none %}
    {{- "\n\nFunctions:" }}
    {%- for tool in tools %}{{ "\n" + (tool | tojson(indent=4)) }}{% endfor %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in rest %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{ raise_exception("one call at a time") }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- "<|start_header_id|>assistant<|end_header_id|>\n\n" }}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + "}<|eot_id|>" }}
    {%- elif message.role == "tool" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" + (message.content | tojson) + "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\n\n" + (message.content | trim) + "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start_header_id|>assistant<|end_header_id|>\n\n" }}{% endif %}
"""

QWEN_25 = """
{%- set told = messages[0].content if messages[0].role == "system" else "Be of help." %}
{{- "<|im_start|>system\n" + told }}
{%- if tools %}
    {{- "\n\nYou have functions:\n<tools>" }}
    {%- for tool in tools %}{{ "\n" }}{{ tool | tojson }}{% endfor %}
    {{- "\n</tools>" }}
{%- endif %}
{{- "<|im_end|>\n" }}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}{{ "<|im_start|>user" }}{% endif %}
        {{- "\n<tool_response>\n" + message.content + "\n</tool_response>" }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{ "<|im_end|>\n" }}{% endif %}
    {%- elif message.role == "assistant" %}
        {{- "<|im_start|>assistant" }}
        {%- if message.content %}{{ "\n" + message.content }}{% endif %}
        {%- for call in message.tool_calls %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{ "}\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\n" }}
    {%- elif not (message.role == "system" and loop.first) %}
        {{- "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}
"""

QWEN_3 = """
{%- set found = namespace(asked=0) %}
{%- for message in messages %}{% if message.role == "user" %}{% set found.asked = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\n" }}
    {%- if message.role == "assistant" %}
        {%- set said = message.content %}{% set thought = message.reasoning_content or "" %}
        {%- if not thought and "</think>" in said %}
            {%- set thought = said.split("</think>")[0].split("<think>")[-1].strip("\n") %}
            {%- set said = said.split("</think>")[-1].lstrip("\n") %}
        {%- endif %}
        {%- if loop.index0 > found.asked and (loop.last or thought) %}
            {{- "<think>\n" + thought + "\n</think>\n\n" }}
        {%- endif %}
        {{- said }}
    {%- else %}{{ message.content }}{% endif %}
    {{- "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ "<think>\n\n</think>\n\n" }}{% endif %}
{%- endif %}
"""

GEMMA = """
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "system" %}{{ raise_exception("no system messages here") }}{% endif %}
    {%- if (message.role == "user") != (loop.index0 % 2 == 0) %}{{ raise_exception("take turns") }}{% endif %}
    {{- "<start_of_turn>" + ("model" if message.role == "assistant" else message.role) + "\n" }}
    {{- message.content | trim }}{{ "<end_of_turn>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<start_of_turn>model\n" }}{% endif %}
"""

PHI_3 = """
{%- for message in messages %}
    {{- "<|" + message.role + "|>\n" + message.content + "<|end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|assistant|>\n" }}{% else %}{{ eos_token }}{% endif %}
"""

MISTRAL = """
{{- bos_token }}
{%- set told = "" %}{% set rest = messages %}
{%- if messages[0].role == "system" %}{% set told = messages[0].content %}{% set rest = messages[1:] %}{% endif %}
{%- if tools is not none %}{{ "[AVAILABLE_TOOLS] " + (tools | tojson) + "[/AVAILABLE_TOOLS]" }}{% endif %}
{%- for message in rest %}
    {%- if message.role == "user" %}
        {{- "[INST] " + (told + "\n\n" if loop.first and told else "") + message.content + " [/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {{- {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
            {{- "" if loop.last else ", " }}
        {%- endfor %}
        {{- "]" + eos_token }}
    {%- elif message.role == "tool" %}
        {{- "[TOOL_RESULTS] " + message.content + "[/TOOL_RESULTS]" }}
    {%- else %}{{ " " + message.content + eos_token }}{% endif %}
{%- endfor %}
"""

SMOLLM_3 = """
{%- set mode = "/no_think" if enable_thinking is defined and not enable_thinking else "/think" %}
{%- set told = messages[0].content if messages[0].role == "system" else "" %}
{{- "<|im_start|>system\nDate: " + strftime_now("%d %B %Y") + "\nMode: " + mode + "\n\n" + told + "<|im_end|>\n" }}
{%- for message in messages %}
    {%- if message.role == "user" %}{{ "<|im_start|>user\n" + message.content + "<|im_end|>\n" }}
    {%- elif message.role == "assistant" %}
        {% generation %}
        {{- "<|im_start|>assistant\n" + message.content.lstrip("\n") + "<|im_end|>\n" }}
        {% endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" + ("<think>\n\n</think>\n" if mode == "/no_think" else "") }}
{%- endif %}
"""

GENERATION = """
{%- for message in messages -%}
    {{ "<|im_start|>" + message.role + "\n" }}
    {%- if message.role == "assistant" -%}
        {% generation %}{{ message.content + "<|im_end|>" }}{% endgeneration %}
    {%- else -%}{{ message.content + "<|im_end|>" }}{%- endif -%}
    {{ "\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\n" }}{%- endif -%}
"""

ZEPHYR = """
{%- for message in messages %}
    {{- "<|" + message.role + "|>\n" + message.content + eos_token + "\n" }}
    {%- if loop.last and add_generation_prompt %}{{ "<|assistant|>" + "\n" }}{% endif %}
{%- endfor %}
"""

HERMES = """
{{- bos_token }}
{%- for message in messages %}{{ "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n" }}{% endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}
"""

HERMES_TOOLS = """
{{- bos_token + "<|im_start|>system\nCall what you need. <tools> " }}
{%- for tool in tools %}{{ tool.function | tojson }} {% endfor %}
{{- "</tools>" }}{% if messages[0].role == "system" %}{{ "\n" + messages[0].content }}{% endif %}{{ "<|im_end|>\n" }}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {{- "<|im_start|>tool\n<tool_response>\n" + message.content + "\n</tool_response>\n<|im_end|>\n" }}
    {%- elif message.tool_calls %}
        {{- "<|im_start|>assistant" }}
        {%- for call in message.tool_calls %}
            {{- "\n<tool_call>\n" + ({"name": call.function.name, "arguments": call.function.arguments} | tojson) }}
            {{- "\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\n" }}
    {%- elif not (loop.first and message.role == "system") %}
        {{- "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}
"""

DEEPSEEK = """
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- "<|Assistant|>" + message.content.split("</think>")[-1] + eos_token }}
    {%- elif message.role == "user" %}{{ "<|User|>" + message.content }}
    {%- else %}{{ message.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|Assistant|><think>\n" }}{% endif %}
"""

PLAIN = """
{%- for message in messages %}{{ message.role | upper + ": " + message.content + "\n" }}{% endfor %}
{%- if add_generation_prompt %}{{ "ASSISTANT:" }}{% endif %}
"""


@dataclass(frozen=True)
class Family:
    """A template with the tokenizer it goes with.

    Attributes:
        end: the control token that ends a turn; None if there is none.
        rewrites: it writes a reply differently once the conversation goes on.
        system: it takes system messages.
        tools: it has a place for tools.
    """

    template: str | list[dict[str, str]]
    tokenizer: Callable[[], FastTokenizer]
    end: str | None
    eos: str
    bos: str = ""
    rewrites: bool = False
    system: bool = True
    tools: bool = False
    special: dict[str, str] = field(default_factory=dict)


def _special(*texts: str, **options: bool) -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=False, **options) for text in texts]


def _other(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, special=False, normalized=False) for text in texts]


CHATML = _special("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THOUGHTS = _other("<think>", "</think>")
CALLS = _other("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
HEADERS = _special("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

FAMILIES: dict[str, Family] = {
    "llama-3": Family(
        LLAMA_3, lambda: byte_level(HEADERS), "<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>", tools=True
    ),
    "qwen-2.5": Family(QWEN_25, lambda: byte_level([*CHATML, *CALLS]), "<|im_end|>", "<|endoftext|>", tools=True),
    "qwen-3": Family(QWEN_3, lambda: byte_level([*CHATML, *THOUGHTS]), "<|im_end|>", "<|im_end|>", rewrites=True),
    "gemma": Family(
        GEMMA,
        lambda: sentencepiece_bpe(
            [*_special("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), *_other("\n\n", "<h1>")]
        ),
        "<end_of_turn>",
        "<eos>",
        "<bos>",
        system=False,
    ),
    "phi-3": Family(
        PHI_3,
        lambda: sentencepiece_bpe(
            [
                *_special("<|endoftext|>"),
                *_special("<|end|>", "<|user|>", "<|assistant|>", "<|system|>", rstrip=True),
            ],
            control_in_vocabulary=False,
        ),
        "<|end|>",
        "<|endoftext|>",
    ),
    "mistral": Family(
        MISTRAL,
        lambda: sentencepiece_bpe(
            [
                *_special("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"),
                *_special("[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
            ]
        ),
        "</s>",
        "</s>",
        "<s>",
        tools=True,
    ),
    "smollm-3": Family(SMOLLM_3, lambda: byte_level([*CHATML, *THOUGHTS]), "<|im_end|>", "<|im_end|>"),
    "generation": Family(GENERATION, lambda: byte_level(CHATML), "<|im_end|>", "<|endoftext|>"),
    "zephyr": Family(ZEPHYR, lambda: sentencepiece_bpe(_special("<s>", "</s>")), "</s>", "</s>", "<s>"),
    "hermes": Family(
        [{"name": "default", "template": HERMES}, {"name": "tool_use", "template": HERMES_TOOLS}],
        lambda: byte_level([*CHATML, *CALLS]),
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
        tools=True,
    ),
    "deepseek": Family(
        DEEPSEEK,
        lambda: byte_level([*_special("<|begin|>", "<|end|>"), *_other("<|User|>", "<|Assistant|>"), *THOUGHTS]),
        "<|end|>",
        "<|end|>",
        "<|begin|>",
        rewrites=True,
    ),
    "no-end": Family(PLAIN, lambda: byte_level(_special("<|endoftext|>")), None, "<|endoftext|>", rewrites=True),
}
