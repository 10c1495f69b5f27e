"""A short run of `make fuzz`: what schemathesis makes of both API documents, against real processes."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import schemathesis
from fastapi import FastAPI
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import FailureGroup

from benchmarks.fuzz import Fuzz
from benchmarks.fuzz_chains import Chains
from tests.cluster import Cluster
from tests.services.gateway.conftest import served

REQUESTS, CHAINED = 550, 150
SECONDS, CHAINED_SECONDS = 35.0, 10.0


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
