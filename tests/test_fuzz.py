"""A short run of `make fuzz`: what schemathesis makes of both API documents, against real processes."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import FailureGroup

from benchmarks.fuzz import CHECKS, Fuzz, call, document, endpoint
from benchmarks.fuzz_chains import Chains
from tests.cluster import Cluster
from tests.services.gateway.conftest import served

REQUESTS, CHAINED = 550, 150
SECONDS, CHAINED_SECONDS = 25.0, 8.0


def test_no_request_of_the_documents_breaks_their_word(tiny_stack: Cluster) -> None:
    with tiny_stack.client() as http:
        fuzz = Fuzz(tiny_stack, http, number=1)
        # On a slow machine fewer requests, never a longer test.
        fuzz.run(REQUESTS, SECONDS)
        fuzz.chains(CHAINED, CHAINED_SECONDS)
        assert http.get("/health/ready").json()["inference"] == {"tiny": True}
    report = fuzz.report()
    assert report["server_errors"] == 0, report["found"]
    assert report["violations"] == 0, json.dumps(report["found"], indent=1)
    assert report["requests"] > 100
    assert report["share_2xx"] >= 0.2
    assert "Traceback" not in tiny_stack.processes.tails(1 << 24)


MESSAGES = [{"role": "user", "content": "Hi"}]
STREAMED = [
    ("/v1/chat/completions", {"model": "tiny", "messages": MESSAGES, "stream": True, "max_tokens": 3}),
    ("/v1/completions", {"model": "tiny", "prompt": "Hi", "stream": True, "max_tokens": 3}),
    ("/generate", {"inputs": "Hi", "stream": True, "parameters": {"max_new_tokens": 3}}),
]


@pytest.mark.parametrize("service", ["gateway.json", "inference.json"])
@pytest.mark.parametrize(("path", "body"), STREAMED, ids=lambda value: value if isinstance(value, str) else "")
def test_every_event_of_a_stream_is_as_documented(
    tiny_stack: Cluster, service: str, path: str, body: dict[str, Any]
) -> None:
    """Requests at random stream now and then only."""
    operation = document(service)[path]["POST"]
    case = operation.Case(body=body, media_type="application/json")
    answer = case.call(**call(*endpoint(tiny_stack, service)))
    assert answer.headers["content-type"][0].startswith("text/event-stream")
    case.validate_response(answer, checks=CHECKS)


def test_chains_find_what_outlives_its_deletion() -> None:
    """The checks themselves, on a service that only says that it deletes."""
    app = FastAPI()

    @app.post("/things")
    def create() -> dict[str, str]:
        return {"id": "thing-1"}

    @app.get("/things/{thing_id}")
    def retrieve(thing_id: str) -> dict[str, str]:
        return {"id": thing_id}

    @app.delete("/things/{thing_id}")
    def delete(thing_id: str) -> dict[str, str]:
        return {"id": thing_id}

    found: set[str] = set()
    sent = 0

    def judge(case: Any, answer: Any, check: Callable[[Sequence[Any]], None]) -> None:
        nonlocal sent
        sent += 1
        try:
            check(())
        except FailureGroup as failure:
            found.update(type(why).__name__ for why in failure.exceptions)

    config = SchemathesisConfig.from_dict({"generation": {"mode": "positive"}})
    with served(app) as url:
        schema = schemathesis.openapi.from_dict(typed(app.openapi()), config=config)
        chains = Chains(schema, lambda: None, lambda case: None, judge, {"base_url": url, "timeout": 30})
        chains.run(lambda: bool(found) or sent > 2000, 30, 1)
    assert found == {"UseAfterFree"}


def typed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with answers that say what an id is: links are inferred from it."""
    answer = {"type": "object", "required": ["id"], "properties": {"id": {"type": "string"}}}
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"]["200"]["content"]["application/json"]["schema"] = answer
    return document
