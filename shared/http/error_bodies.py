"""The two error bodies as the API documents describe them; `shared.http.web` makes them."""

from typing import Any

from pydantic import BaseModel


class RowErrorJson(BaseModel):
    """One bad row of a dataset; `path` says where in the row."""

    line: int
    path: str
    code: str
    message: str


class ErrorDetailJson(BaseModel):
    """`errors` (the first bad rows) and `error_count` come with the code `invalid_dataset` only."""

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


def _errors(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    return {
        "4XX": {"model": model, "description": "The request is at fault; the message names the field"},
        "5XX": {"model": model, "description": "A part of the system is away; 503 is worth retrying"},
    }


OPENAI_ERRORS = _errors(ErrorJson)
TGI_ERRORS = _errors(TgiErrorJson)
