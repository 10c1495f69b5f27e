"""The gateway on PostgreSQL: the very tests that it passes on SQLite, where the two databases could differ."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.gateway.settings import GatewaySettings
from tests.fresh_database import fresh_on_server
from tests.services.gateway.conftest import ROWS, Gateway
from tests.services.gateway.files.test_uploads import test_ids_that_are_none
from tests.services.gateway.jobs.test_request_schema import (
    test_a_file_cannot_vanish_while_a_job_takes_it,
    test_jobs_that_are_none,
    test_metadata_with_any_key_is_found_again,
)
from tests.services.gateway.routes.test_estimates import (
    gateway_with_tiny,
    test_an_estimate_reckons_with_the_device_of_the_newest_worker,
    test_reports_that_name_no_device_count_on_a_cpu_until_others_do,
)
from tests.services.gateway.test_openai_client import (
    test_a_job_from_creation_to_its_model,
    test_events_page_through_without_gaps,
    test_files,
    test_jobs_are_listed_paused_resumed_and_cancelled,
)

# pytest finds what a module names.
__all__ = [
    "gateway_with_tiny",
    "test_a_file_cannot_vanish_while_a_job_takes_it",
    "test_a_job_from_creation_to_its_model",
    "test_an_estimate_reckons_with_the_device_of_the_newest_worker",
    "test_events_page_through_without_gaps",
    "test_files",
    "test_ids_that_are_none",
    "test_jobs_are_listed_paused_resumed_and_cancelled",
    "test_jobs_that_are_none",
    "test_metadata_with_any_key_is_found_again",
    "test_reports_that_name_no_device_count_on_a_cpu_until_others_do",
]


@pytest.fixture
def settings(tmp_path: Path, redis_url: str, postgres_url: str) -> Callable[..., GatewaySettings]:
    """Settings of an installation whose database is a new one on a real PostgreSQL server."""
    url = fresh_on_server(postgres_url)

    def make(**changes: Any) -> GatewaySettings:
        return GatewaySettings.model_validate({"home": tmp_path, "redis_url": redis_url, "database_url": url} | changes)

    return make


@pytest.fixture
def file(gateway: Gateway) -> str:
    return gateway.uploaded(ROWS)
