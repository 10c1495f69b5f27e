"""`python -m benchmarks.fuzz`: requests that schemathesis makes from both OpenAPI documents, against real processes.

Half are valid by the document, half are not. Valid ones are adjusted: they name things that exist and models that are
served, and generate few tokens; otherwise nearly all would end at 404. More follow in chains, with ids from earlier
responses. Every response is checked against the document, and a request that breaks its schema must be refused. Some
6,000 in all: `REQUESTS` and `CHAINED`, rounded up to whole rounds. Writes benchmarks/results/fuzz.json.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, Verbosity, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from benchmarks.fuzz_chains import Chains
from services.openapi import DOCUMENTS, rendered
from shared.storage.manifests import read_manifest
from tests.cluster import TOKEN, Cluster, tiny_stack
from tests.services.inference.adapters_on_disk import write_adapter

RESULT = Path(__file__).parent / "results" / "fuzz.json"
REQUESTS = 5_000
CHAINED = 1_000
MAX_VIOLATIONS = 50
AnyCase = Case[Any]
MAX_NEW_TOKENS = 3
MESSAGES = [{"role": "user", "content": "2 + 2 ="}]
ROWS = b"".join(json.dumps({"instruction": f"{n}?", "output": f"{n * 7}"}).encode() + b"\n" for n in range(20))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


class Things:
    """What exists on the stack, made as a case needs it."""

    def __init__(self, stack: Cluster, http: httpx.Client) -> None:
        self._http, self._stack = http, stack
        base = read_manifest(stack.artifacts.base("tiny"), "base")
        self.adapter = write_adapter(stack.artifacts, stack.folder / "tiny-model", base, seed=1)
        self.file = self.new_file()
        self.job = self.new_job()
        self.response = self.new_response()

    def renew(self) -> None:
        """A file for a chain; the one before may have deleted its own."""
        self.file = self.new_file()

    def load(self) -> None:
        """An adapter for a chain at inference."""
        url = f"{self._stack.inference_url}/adapters/{self.adapter}"
        httpx.put(url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60).raise_for_status()

    def new_file(self) -> str:
        form: dict[str, Any] = {"data": {"purpose": "fine-tune"}, "files": {"file": ("data.jsonl", ROWS)}}
        made: str = self._http.post("/v1/files", **form).raise_for_status().json()["id"]
        return made

    def new_job(self) -> str:
        body = {"model": "tiny", "training_file": self.file}
        made: str = self._http.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
        return made

    def new_response(self) -> str:
        body = {"model": "tiny", "input": MESSAGES[0]["content"], "max_output_tokens": MAX_NEW_TOKENS}
        made: str = self._http.post("/v1/responses", json=body).raise_for_status().json()["id"]
        return made

    def steer(self, case: AnyCase, chance: random.Random, *, chained: bool = False) -> None:
        """Make a valid case name what exists, most of the time. A chain takes its ids from earlier responses."""
        if chance.random() < 0.2:
            return
        path_parameters: Any = case.path_parameters
        query: Any = case.query
        headers: Any = case.headers
        changing = case.method in ("DELETE", "POST")
        ids: dict[str, Callable[[], str]] = {
            "file_id": self.new_file if changing else lambda: self.file,
            "job_id": self.new_job if changing else lambda: self.job,
            "response_id": self.new_response if changing else lambda: self.response,
            "model_id": lambda: "tiny",
            "adapter_id": lambda: self.adapter,
        }
        for name in () if chained else path_parameters or {}:
            path_parameters[name] = ids[name]()
        if query and "model" in query:
            query["model"] = "tiny"
        for parameters, names in ((query, ("after",)), (headers, ("Idempotency-Key", "last-event-id"))):
            for name in names if parameters else ():
                parameters.pop(name, None)
        if isinstance(case.body, dict):
            self._steer_body(case.path, case.body)

    def _steer_body(self, path: str, body: dict[str, Any]) -> None:
        if path == "/v1/files":
            body["file"] = ROWS
        elif path in ("/v1/fine_tuning/jobs", "/v1/fine_tuning/estimates"):
            body |= {"model": "tiny", "training_file": self.file}
            for name in ("training_files", "validation_file", "hyperparameters", "method", "lora"):
                body.pop(name, None)
        elif path == "/v1/responses":
            body |= {"model": "tiny", "input": MESSAGES[0]["content"]}
            body.pop("previous_response_id", None)
        elif path.startswith("/v1/"):
            body |= {"model": "tiny"} | ({"messages": MESSAGES} if "messages" in body else {"prompt": "2 + 2 ="})
        else:
            parameters = body.get("parameters")
            if isinstance(parameters, dict):
                parameters.pop("adapter_id", None)
            given = [name for name in ("inputs", "instruction", "messages") if body.get(name)]
            for name in given[1:] if given else []:
                del body[name]
            if not given:
                body["inputs"] = "2 + 2 ="
            if "instruction" not in body:
                body.pop("input", None)


def shorten(case: AnyCase) -> None:
    """Limit new tokens: they prove nothing here and cost most of the time."""
    body: Any = case.body
    if not isinstance(body, dict) or case.method != "POST":
        return
    if case.path.startswith("/v1/"):
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(body.get(name), int) and body[name] > MAX_NEW_TOKENS:
                body[name] = MAX_NEW_TOKENS
        if "completions" in case.path and not {"max_tokens", "max_completion_tokens"} & set(body):
            body["max_tokens"] = MAX_NEW_TOKENS
        if case.path == "/v1/responses":
            body.setdefault("max_output_tokens", MAX_NEW_TOKENS)
    elif isinstance(body.get("parameters", {}), dict):
        parameters = body.setdefault("parameters", {})
        wanted = parameters.get("max_new_tokens", 100)
        if isinstance(wanted, int):
            parameters["max_new_tokens"] = min(wanted, MAX_NEW_TOKENS)


def with_key(case: AnyCase) -> None:
    """Remove a generated key, so that the right one is sent."""
    headers: Any = case.headers
    for name in [name for name in headers or () if name.lower() == "authorization"]:
        del headers[name]


def wrong_elsewhere(case: AnyCase) -> bool:
    """Whether more than the headers breaks the document."""
    components = case.meta.components.items() if case.meta else ()
    return any(info.mode is GenerationMode.NEGATIVE for where, info in components if where.value != "header")


def document(name: str, *modes: str) -> Any:
    """schemathesis' schema of one of our API documents; it generates requests of the given mode, of both by default."""
    # The services ignore unknown parameters, so that clients written for later versions work.
    generation: dict[str, Any] = {"allow-extra-parameters": False} | ({"mode": modes[0]} if modes else {})
    config = SchemathesisConfig.from_dict({"generation": generation})
    return schemathesis.openapi.from_dict(json.loads(rendered(name)), config=config)


def call(url: str, bearer: dict[str, str]) -> dict[str, Any]:
    """How a case is sent."""
    # JSON, not an event stream, which would end with the job: no job is trained here.
    return {"base_url": url, "headers": bearer | {"Accept": "application/json"}, "timeout": 60}


def endpoint(stack: Cluster, document: str) -> tuple[str, dict[str, str]]:
    """The URL of a document's operations, and the header that authorises them."""
    private = document == "inference.json"
    url = stack.inference_url if private else stack.url
    return url, {"Authorization": f"Bearer {TOKEN if private else stack.key}"}


class Fuzz:
    """One run against one stack; `report` is what the results file holds."""

    def __init__(self, stack: Cluster, http: httpx.Client, number: int) -> None:
        self._stack = stack
        self._things = Things(stack, http)
        self._chance = random.Random(number)
        self._seed = number
        self.statuses: dict[str, Counter[int]] = defaultdict(Counter)
        self.server_errors: list[dict[str, Any]] = []
        self.violations: list[dict[str, Any]] = []

    def run(self, requests: int, seconds: float = float("inf")) -> None:
        """About `requests` requests, spread evenly over operations and modes; fewer if `seconds` have passed."""
        self._deadline = time.monotonic() + seconds
        operations: list[tuple[str, Any]] = [
            (name, found.ok()) for name in DOCUMENTS for found in document(name).get_all_operations()
        ]
        each = -(-requests // (2 * len(operations)))
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            for name, operation in operations:
                with suppress(Unsatisfiable):
                    self._operation(name, operation, mode, each)
        # Operations without parameters have no invalid form: the others get the requests that are missing.
        while self.sent < requests and time.monotonic() < self._deadline:
            self._seed += 1
            for name, operation in operations:
                if operation.body or operation.path_parameters or operation.query:
                    self._operation(name, operation, GenerationMode.POSITIVE, 10)

    def chains(self, requests: int, seconds: float = float("inf")) -> None:
        """About `requests` more, most of them with ids of earlier responses; fewer if `seconds` have passed."""
        for name, begin, share in (
            ("gateway.json", self._things.renew, 0.8),
            ("inference.json", self._things.load, 0.2),
        ):
            chains = Chains(
                document(name, "positive"),
                begin,
                self._steer_chained,
                partial(self._judge_chained, name),
                call(*endpoint(self._stack, name)),
            )
            chains.run(partial(self._has_sent, self.sent + share * requests), share * seconds, self._seed)

    def _has_sent(self, requests: float) -> bool:
        return self.sent >= requests

    def _steer_chained(self, case: AnyCase) -> None:
        self._things.steer(case, self._chance, chained=True)
        shorten(case)

    def _judge_chained(self, document: str, case: AnyCase, answer: Any, check: Callable[[Any], None]) -> None:
        label = f"{document.removesuffix('.json')} {case.operation.label}"
        self._judge(label, case, answer, lambda: check(CHECKS))

    @property
    def sent(self) -> int:
        return sum(sum(counts.values()) for counts in self.statuses.values())

    def _operation(self, document: str, operation: Any, mode: GenerationMode, examples: int) -> None:
        url, bearer = endpoint(self._stack, document)
        label = f"{document.removesuffix('.json')} {operation.label}"

        @seed(self._seed)
        @hypothesis_settings(
            max_examples=examples,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            verbosity=Verbosity.quiet,
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(generation_mode=mode))
        def send(case: AnyCase) -> None:
            if time.monotonic() < self._deadline:
                self._send(label, case, mode, url, bearer)

        send()

    def _send(self, label: str, case: AnyCase, mode: GenerationMode, url: str, bearer: dict[str, str]) -> None:
        checks = CHECKS
        if mode is GenerationMode.POSITIVE:
            self._things.steer(case, self._chance)
        elif self._chance.random() < 0.8:
            # Most invalid requests should reach a handler, not be refused for their key.
            with_key(case)
            checks = (
                CHECKS if wrong_elsewhere(case) else [check for check in CHECKS if check != negative_data_rejection]
            )
        shorten(case)
        answer = case.call(**call(url, bearer))
        self._judge(label, case, answer, lambda: case.validate_response(answer, checks=checks))

    def _judge(self, label: str, case: AnyCase, answer: Any, check: Callable[[], None]) -> None:
        self.statuses[label][answer.status_code] += 1
        finding = {"operation": label, "status": answer.status_code, "request": case.as_curl_command()[:600]}
        finding["answer"] = answer.text[:300]
        if answer.status_code >= 500:
            self.server_errors.append(finding)
        try:
            check()
        except (Failure, FailureGroup) as failure:
            causes = failure.exceptions if isinstance(failure, FailureGroup) else [failure]
            self.violations += [finding | {"why": f"{type(cause).__name__}: {cause}"[:500]} for cause in causes]

    def report(self) -> dict[str, Any]:
        total = sum(sum(counts.values()) for counts in self.statuses.values())
        good = sum(n for counts in self.statuses.values() for status, n in counts.items() if status < 300)
        return {
            "requests": total,
            "share_2xx": round(good / total, 3),
            "server_errors": len(self.server_errors),
            "violations": len(self.violations),
            "per_operation": {
                label: {str(status): n for status, n in sorted(counts.items())}
                for label, counts in sorted(self.statuses.items())
            },
            "found": (self.server_errors + self.violations)[:MAX_VIOLATIONS],
        }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--chained", type=int, default=CHAINED, help="further requests, in chains")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULT)
    given_arguments = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="tunesmith-fuzz-") as folder,
        tiny_stack(Path(folder)) as stack,
        stack.client() as http,
    ):
        fuzz = Fuzz(stack, http, given_arguments.seed)
        fuzz.run(given_arguments.requests)
        fuzz.chains(given_arguments.chained)
    report = {"command": "make fuzz", "seed": given_arguments.seed} | fuzz.report()
    given_arguments.output.parent.mkdir(parents=True, exist_ok=True)
    given_arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    for one in report["found"]:
        print(json.dumps(one, indent=2), file=sys.stderr)
    print({key: report[key] for key in ("requests", "share_2xx", "server_errors", "violations")})
    return 1 if report["server_errors"] or report["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
