"""What routes have in common before their clients: how errors look, that a key is needed, answers given again."""

from typing import Any

from fastapi import Depends, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from services.gateway.answers import Answer


class RowErrorJson(BaseModel):
    """One bad row of a dataset; `path` says where in the row."""

    line: int
    path: str
    code: str
    message: str


class ErrorDetailJson(BaseModel):
    """`errors` and `error_count` come with the code `invalid_dataset` only: the first rows that are wrong."""

    message: str
    type: str
    param: str | None
    code: str
    errors: list[RowErrorJson] = []
    error_count: int | None = None


class ErrorJson(BaseModel):
    """OpenAI's error body."""

    error: ErrorDetailJson


class TgiErrorJson(BaseModel):
    """text-generation-inference's error body."""

    error: str
    error_type: str


def errors(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    return {
        "4XX": {"model": model, "description": "The request is at fault; the message names the field"},
        "5XX": {"model": model, "description": "A part of the system is away; 503 is worth retrying"},
    }


OPENAI_ERRORS = errors(ErrorJson)
TGI_ERRORS = errors(TgiErrorJson)
# It only documents: the route class has refused whoever has no key before this is asked.
NEEDS_KEY = Depends(HTTPBearer(auto_error=False, scheme_name="api_key", description="An API key, `ts-…`"))


def answered(answer: Answer, *, again: bool = False) -> Response:
    """A kept answer, byte for byte; a header says if it was given before."""
    headers = {"idempotent-replayed": "true"} if again else {}
    return Response(answer.body, answer.status, headers, media_type="application/json")
