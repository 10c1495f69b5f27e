"""instructor in its mode that asks for JSON by a schema."""

import os

import instructor
from openai import OpenAI
from pydantic import BaseModel


class Verdict(BaseModel, extra="forbid"):
    yes: bool


plain = OpenAI(base_url=f"{os.environ['URL']}/v1", api_key=os.environ["KEY"], max_retries=0)
for mode in (instructor.Mode.JSON_SCHEMA,):
    client = instructor.from_openai(plain, mode=mode)
    answer = client.chat.completions.create(
        model=os.environ["BASE"],
        messages=[{"role": "user", "content": "Is it so?"}],
        response_model=Verdict,
        max_tokens=200,
        max_retries=1,
        temperature=0,
    )
    assert isinstance(answer, Verdict), mode
