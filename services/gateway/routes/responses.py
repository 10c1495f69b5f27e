"""What routes have in common before their clients: how errors look, that a key is needed, answers given again."""

from fastapi import Depends, Response
from fastapi.security import HTTPBearer

from services.gateway.http.idempotency import Answer
from shared.http.error_bodies import OPENAI_ERRORS, TGI_ERRORS

__all__ = ["NEEDS_KEY", "OPENAI_ERRORS", "TGI_ERRORS", "answered"]

# It only documents: the route class has refused whoever has no key before this is asked.
NEEDS_KEY = Depends(HTTPBearer(auto_error=False, scheme_name="api_key", description="An API key, `ts-…`"))


def answered(answer: Answer, *, again: bool = False) -> Response:
    """A kept answer, byte for byte; a header says if it was given before."""
    headers = {"idempotent-replayed": "true"} if again else {}
    return Response(answer.body, answer.status, headers, media_type="application/json")
