"""The fields of requests in docs/compatibility.md, from the bodies themselves: done, taken and ignored, or refused.

`python -m docs.fields` writes them; with `--check` it only says whether they are stale.
"""

import sys
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from docs.written_part import ROOT, write_or_check
from services.gateway.responses.request_schema import InputItem, ResponseBody
from services.gateway.responses.tool_schema import ResponseTool
from shared.inference_api.fields import ChatMessage
from shared.inference_api.ignored import Ignored, Only
from shared.inference_api.openai import ChatCompletionBody, CompletionBody
from shared.inference_api.tgi import GenerateBody, Parameters

PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- fields: written by `make docs` -->\n", "<!-- end of fields -->"
BODIES: dict[str, type[BaseModel]] = {
    "`POST /v1/chat/completions`": ChatCompletionBody,
    "Each of its `messages`": ChatMessage,
    "`POST /v1/completions`": CompletionBody,
    "`POST /v1/responses`": ResponseBody,
    "Each item of its `input`": InputItem,
    "Each of its `tools`": ResponseTool,
    "`POST /generate`": GenerateBody,
    "Its `parameters`": Parameters,
}


def main() -> int:
    return write_or_check(PAGE, BEGIN, END, fields())


def fields() -> str:
    """Tables of every body's fields, as Markdown."""
    return "".join(f"{line}\n" for title, body in BODIES.items() for line in _table(title, body))


def _table(title: str, body: type[BaseModel]) -> Iterator[str]:
    done: list[str] = []
    ignored: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for name, field in sorted(body.model_fields.items()):
        code = f"`{field.alias or name}`"
        mark: Any = next((mark for mark in field.metadata if isinstance(mark, Ignored | Only)), None)
        if mark is None:
            done.append(code)
        elif isinstance(mark, Ignored):
            ignored.setdefault(mark.reason, []).append(code)
        else:
            refused.setdefault(mark.instead, []).append(code)
    yield f"\n### {title}\n"
    yield "| fields | what becomes of them |"
    yield "|---|---|"
    yield f"| {', '.join(done)} | done |"
    for reason, names in sorted(ignored.items()):
        yield f"| {', '.join(names)} | ignored: {reason} |"
    for instead, names in sorted(refused.items()):
        yield f"| {', '.join(names)} | refused{f': {instead}' if instead else ''} |"


if __name__ == "__main__":
    sys.exit(main())
