"""What routes have in common before their clients: how errors look, that a key is needed, and responses as JSON."""

from fastapi import Depends, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from services.gateway.http.idempotency import StoredResponse
from shared.http.error_bodies import OPENAI_ERRORS, TGI_ERRORS

__all__ = ["NEEDS_KEY", "OPENAI_ERRORS", "TGI_ERRORS", "json_response", "stored_response"]

# It only documents: the route class has refused requests without a key before this runs.
NEEDS_KEY = Depends(HTTPBearer(auto_error=False, scheme_name="api_key", description="An API key, `ts-…`"))


def json_response(body: BaseModel, *, exclude_none: bool = False) -> Response:
    """A model as JSON, rendered where the endpoint runs.

    Returned as it is, a model would be checked once more, and that in a thread of its own.
    """
    return Response(body.model_dump_json(exclude_none=exclude_none), media_type="application/json")


def stored_response(response: StoredResponse, *, replayed: bool = False) -> Response:
    """A stored response, byte for byte; a header says if it was given before."""
    headers = {"idempotent-replayed": "true"} if replayed else {}
    return Response(response.body, response.status, headers, media_type="application/json")
