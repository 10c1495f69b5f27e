"""A short run of `make fuzz`: what schemathesis makes of both API documents, against real processes."""

from benchmarks.fuzz import Fuzz
from tests.tiny_stack import TinyStack

REQUESTS = 600
SECONDS = 40.0


def test_no_request_of_the_documents_breaks_their_word(tiny_stack: TinyStack) -> None:
    with tiny_stack.client() as http:
        fuzz = Fuzz(tiny_stack, http, number=1)
        # On a slow machine fewer requests, never a longer test.
        fuzz.run(REQUESTS, SECONDS)
        assert http.get("/health/ready").json()["inference"] == {"tiny": True}
    report = fuzz.report()
    assert report["server_errors"] == 0, report["found"]
    assert report["violations"] == 0, report["found"]
    assert report["requests"] > 100
    assert report["share_2xx"] >= 0.2
    assert "Traceback" not in tiny_stack.processes.tails(1 << 24)
