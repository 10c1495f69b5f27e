"""instructor in its modes that ask for JSON by a schema, and by a tool, its default."""

import os
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel


class Verdict(BaseModel, extra="forbid"):
    """What is asked for."""

    yes: bool
    colour: Literal["red", "green"]


plain = OpenAI(base_url=f"{os.environ['URL']}/v1", api_key=os.environ["KEY"], max_retries=0)
asked = {
    "model": os.environ["BASE"],
    "messages": [{"role": "user", "content": "Is it so?"}],
    "max_tokens": 200,
    "max_retries": 1,
    "temperature": 0,
}
for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT):
    client = instructor.from_openai(plain, mode=mode)
    answer = client.chat.completions.create(response_model=Verdict, **asked)
    assert isinstance(answer, Verdict), mode
    *_, last = client.chat.completions.create_partial(response_model=Verdict, **asked)
    assert last.model_dump() == answer.model_dump(), mode
