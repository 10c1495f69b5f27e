"""Bases that the hub refuses are refused when a job names them. The hub is a server of its own here."""

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from services.gateway.bases import hub_access
from services.gateway.bases.hub_access import HubAccess
from services.gateway.bases.metadata import BaseMetadata
from services.gateway.settings import GatewaySettings
from shared.bases.catalogue import Base, Catalogue
from shared.errors import InvalidRequest
from tests.services.gateway.conftest import ROWS, running_gateway
from tests.stack_processes import free_port

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCE = f"hub:some/model@{COMMIT}"
BASE, HERE = Base(id="model", source=SOURCE), Base(id="here", source="folder:/models/here")
PATH = "/v1/fine_tuning/jobs"


def access(clock: Callable[[], float] = time.monotonic, metadata: BaseMetadata | None = None) -> HubAccess:
    return HubAccess(Catalogue((BASE, HERE)), lambda _: metadata, clock)


class Hub(ThreadingHTTPServer):
    """Answers as huggingface.co does: a status, and the reason in the header `x-error-code`."""

    answer: tuple[int, str] = (200, "")

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.server.asked.append(self.path)
        status, code = self.server.answer
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        # What HF_ENDPOINT sets before the library is imported.
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ((403, "GatedRepo"), "model_gated"),
        ((404, "RepoNotFound"), "model_missing"),
        ((404, "RevisionNotFound"), "revision_missing"),
    ],
)
def test_what_the_hub_refuses_is_refused_with_what_to_do(hub: Hub, answer: tuple[int, str], code: str) -> None:
    hub.answer = answer
    with pytest.raises(InvalidRequest) as refused:
        access().check(BASE.id)
    assert (refused.value.code, refused.value.param) == (code, "model")
    assert refused.value.message.startswith("model: ")
    assert hub.asked == [f"/some/model/resolve/{COMMIT}/config.json"]


@pytest.mark.parametrize("answer", [(200, ""), (500, ""), (429, "")])
def test_what_the_hub_gives_or_cannot_tell_is_let_through_and_asked_for_once_a_minute(
    hub: Hub, answer: tuple[int, str]
) -> None:
    now = 100.0
    hub.answer = answer
    asking = access(lambda: now)
    asking.check(BASE.id)
    asking.check(BASE.id)
    assert len(hub.asked) == 1
    hub.answer = (404, "RepoNotFound")
    now += 61
    with pytest.raises(InvalidRequest):
        asking.check(BASE.id)
    assert len(hub.asked) == 2


def test_bases_from_elsewhere_and_a_hub_that_is_away_refuse_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    access().check(HERE.id)
    hub.answer = (404, "RepoNotFound")
    access(metadata=BaseMetadata(False, frozenset())).check(BASE.id)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{free_port()}/{{repo_id}}/{{revision}}/{{filename}}",
    )
    access().check(BASE.id)
    assert hub.asked == []


def test_a_slow_hub_holds_one_request_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    asking, answer = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        asking.set()
        assert answer.wait(120)

    monkeypatch.setattr(hub_access, "check_access", slow)
    hub = access()
    first = threading.Thread(target=hub.check, args=(BASE.id,))
    first.start()
    assert asking.wait(120)
    hub.check(BASE.id)
    answer.set()
    first.join()


def test_a_job_on_a_gated_base_is_refused_at_its_creation(hub: Hub, settings: Callable[..., GatewaySettings]) -> None:
    body = {"model": "tinyllama-1.1b-chat"}
    with running_gateway(settings()) as gateway:
        body["training_file"] = gateway.uploaded(ROWS)
        hub.answer = (403, "GatedRepo")
        refused = gateway.http.post(PATH, json=body)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("model_gated", "model")
        assert "set HF_TOKEN" in error["message"]
        assert gateway.http.get(PATH).json()["data"] == []
        # One that needs no hub goes on being taken.
        assert gateway.http.post(PATH, json=body | {"model": "smollm2-135m-instruct"}).is_success
