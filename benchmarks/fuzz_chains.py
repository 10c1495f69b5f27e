"""Chains of requests: schemathesis infers from the documents which operation takes the id in which response.

A dataset is uploaded, read and deleted; a job is created, paused, resumed and cancelled, in any order. Each response is
checked for its form; besides, what was created must exist and what was deleted must not. Knows no stack: every response
is passed to `judge`.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, seed
from hypothesis import settings as hypothesis_settings
from requests import Response
from schemathesis import Case
from schemathesis.generation.stateful.state_machine import APIStateMachine
from schemathesis.specs.openapi.checks import ensure_resource_availability, use_after_free

CHAIN_CHECKS = (use_after_free, ensure_resource_availability)
STEPS = 8
SCENARIOS = 5
Judge = Callable[[Any, Any, Callable[[Sequence[Any]], None]], None]


class Chains:
    """Runs chains over one document.

    Args:
        schema: schemathesis' schema, which generates valid requests only.
        begin: called before each chain.
        prepare: called with each case before it is sent.
        judge: gets a case, its response, and a function that runs a list of checks on it and raises their failures.
        call: keyword arguments of every call.
    """

    def __init__(
        self,
        schema: Any,
        begin: Callable[[], None],
        prepare: Callable[[Case[Any]], None],
        judge: Judge,
        call: dict[str, Any],
    ) -> None:
        machine: type[APIStateMachine] = schema.as_state_machine()

        class Chain(machine):  # type: ignore[misc, valid-type]
            def setup(self) -> None:
                begin()

            def before_call(self, case: Case[Any]) -> None:
                prepare(case)

            def get_call_kwargs(self, case: Case[Any]) -> dict[str, Any]:
                return call

            def validate_response(self, response: Response, case: Case[Any], **kwargs: Any) -> None:
                def check(checks: Sequence[Any]) -> None:
                    case.validate_response(
                        response,
                        checks=[*checks, *CHAIN_CHECKS],
                        transport_kwargs=kwargs,
                        recorder=self.recorder,
                    )

                judge(case, response, check)

        self._machine = Chain

    def run(self, enough: Callable[[], bool], seconds: float, number: int) -> None:
        """Chain after chain until there are enough of them or `seconds` have passed."""
        deadline = time.monotonic() + seconds
        settings = hypothesis_settings(
            max_examples=SCENARIOS,
            stateful_step_count=STEPS,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            verbosity=Verbosity.quiet,
            suppress_health_check=list(HealthCheck),
        )
        while not enough() and time.monotonic() < deadline:
            number += 1
            seed(number)(self._machine).run(settings=settings)
