"""A small client of Tunesmith's own HTTP surface. Every failure is one exception.

For anything OpenAI has too, the official `openai` client works as well; this one adds pause, resume and `/generate`,
and needs nothing but httpx.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import quote, urlsplit

import httpx

from tunesmith.connection import Connection
from tunesmith.sse import data_of

Json = dict[str, Any]
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ApiError(Exception):
    """The server refused a request, or could not be reached.

    Attributes:
        status: HTTP status; None if no answer came.
        code: the server's error code, for programs.
        param: the field at fault.
        retry_after: seconds after which to try again, if the server said so.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param
        self.retry_after = retry_after

    @property
    def passing(self) -> bool:
        """Whether the same request may succeed later: no response, a server error, or a full queue."""
        return self.status is None or self.status == 429 or self.status >= 500

    @property
    def denied(self) -> bool:
        """Whether the key was refused or the thing does not exist (for this key)."""
        return self.status in (401, 403, 404)


class Client:
    """Speaks to one gateway.

    Args:
        timeout: seconds without a byte before a request fails.
        transport: in place of the network (tests).
    """

    def __init__(
        self, connection: Connection, *, timeout: float = 60, transport: httpx.BaseTransport | None = None
    ) -> None:
        self._http = httpx.Client(
            base_url=connection.url,
            headers={"authorization": f"Bearer {connection.api_key}"} if connection.api_key else {},
            timeout=timeout,
            transport=transport,
            # The environment's proxy settings are not meant for this machine's own ports.
            trust_env=urlsplit(connection.url).hostname not in LOOPBACK,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def upload(self, path: Path, on_bad_rows: Literal["refuse", "skip"] = "refuse") -> Json:
        """Upload a dataset; the answer's `dataset` says what is in it.

        Args:
            on_bad_rows: whether bad rows are left out, or the file is refused for them.

        Raises:
            ApiError: `invalid_dataset`, with the first wrong lines in the message; or another failure.
            OSError: the file cannot be read.
        """
        with path.open("rb") as file:
            form = {"purpose": "fine-tune"} | ({} if on_bad_rows == "refuse" else {"on_bad_rows": on_bad_rows})
            return self._json("POST", "/v1/files", data=form, files={"file": (path.name, file)})

    def files(self, limit: int = 100) -> Iterator[Json]:
        """The newest datasets, newest first."""
        return self._pages("/v1/files", limit)

    def delete_file(self, file_id: str) -> Json:
        return self._json("DELETE", "/v1/files/" + quote(file_id, safe=""))

    def preview(self, file_id: str, **query: str | int) -> Json:
        """Rows as a model will be given them; `query` holds at least `model`."""
        return self._json("GET", f"/v1/files/{quote(file_id, safe='')}/preview", params=query)

    def estimate(self, body: Json) -> Json:
        """What a job with this body would take; none is created."""
        return self._json("POST", "/v1/fine_tuning/estimates", json=body)

    def create_job(self, body: Json) -> Json:
        return self._json("POST", "/v1/fine_tuning/jobs", json=body)

    def job(self, job_id: str) -> Json:
        return self._json("GET", _job(job_id))

    def jobs(self, limit: int = 20) -> Iterator[Json]:
        """The newest jobs, newest first."""
        return self._pages("/v1/fine_tuning/jobs", limit)

    def events(self, job_id: str, limit: int = 1000) -> Iterator[Json]:
        """A job's newest events, newest first."""
        return self._pages(_job(job_id) + "/events", limit)

    @contextmanager
    def stream_events(self, job_id: str, after: str | None = None) -> Iterator[Iterator[Json]]:
        """A job's events as they happen, oldest first, until it ends.

        Args:
            after: id of the last event already seen.

        Raises:
            ApiError: no connection, or it was lost (also while the events are read).
        """
        headers = {"accept": "text/event-stream"} | ({"last-event-id": after} if after else {})
        with self._stream("GET", _job(job_id) + "/events", done=True, headers=headers) as events:
            yield events

    def act(self, job_id: str, verb: str) -> Json:
        """`cancel`, `pause` or `resume` a job; the answer is the job."""
        return self._json("POST", f"{_job(job_id)}/{verb}")

    def checkpoints(self, job_id: str, limit: int = 1000) -> Iterator[Json]:
        """A job's newest checkpoints, newest first."""
        return self._pages(_job(job_id) + "/checkpoints", limit)

    def metrics(self, job_id: str) -> Iterator[Json]:
        """All that a job has measured, one object a step, ascending."""
        after = 0
        while True:
            page = self._json("GET", _job(job_id) + "/metrics", params={"after_step": after, "limit": 10_000})
            yield from page["data"]
            if not page.get("has_more") or not page["data"]:
                return
            after = page["data"][-1]["step"]

    def model(self, name: str) -> Json:
        return self._json("GET", "/v1/models/" + quote(name, safe=""))

    def models(self) -> list[Json]:
        """Bases, adapters and checkpoints."""
        data: list[Json] = self._json("GET", "/v1/models")["data"]
        return data

    def info(self) -> Json:
        """What serves the default base."""
        return self._json("GET", "/info")

    def delete_model(self, name: str) -> Json:
        """Delete an adapter or a checkpoint."""
        return self._json("DELETE", "/v1/models/" + quote(name, safe=""))

    def generate(self, body: Json) -> tuple[Json, httpx.Headers]:
        """`POST /generate`: the answer and its headers (`x-adapter-load-ms` if it waited for an adapter's load)."""
        response = self._request("POST", "/generate", json=body)
        return _decoded(response), response.headers

    @contextmanager
    def generate_stream(self, body: Json) -> Iterator[Iterator[Json]]:
        """`POST /generate_stream`: one object per token, as text-generation-inference has them.

        Raises:
            ApiError: refused, or broken off (also while the tokens are read).
        """
        with self._stream("POST", "/generate_stream", json=body) as events:
            yield events

    @contextmanager
    def chat_stream(self, body: Json) -> Iterator[Iterator[Json]]:
        """`POST /v1/chat/completions`, streamed: OpenAI's chunks.

        Raises:
            ApiError: refused, or broken off (also while the chunks are read).
        """
        with self._stream("POST", "/v1/chat/completions", done=True, json=body | {"stream": True}) as events:
            yield events

    def ready(self) -> bool:
        """Whether the gateway reports that it can take jobs and requests now."""
        try:
            return self._http.get("/health/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def _pages(self, path: str, limit: int) -> Iterator[Json]:
        after: Json = {}
        while limit > 0:
            page = self._json("GET", path, params={"limit": min(limit, 100), **after})
            yield from page["data"]
            limit -= len(page["data"])
            if not page.get("has_more") or not page["data"]:
                return
            after = {"after": page["data"][-1]["id"]}

    def _json(self, method: str, path: str, **options: Any) -> Json:
        return _decoded(self._request(method, path, **options))

    @contextmanager
    def _stream(self, method: str, path: str, *, done: bool = False, **options: Any) -> Iterator[Iterator[Json]]:
        """Objects of an event stream; `done`: a whole stream says [DONE] at its end."""
        try:
            with self._http.stream(method, path, **options) as response:
                if response.is_error:
                    response.read()
                    raise _error(response)
                yield _events(response, done=done and response.status_code != 204)
        except httpx.HTTPError as error:
            raise ApiError(f"cannot reach {self._http.base_url}: {error or type(error).__name__}") from error

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise ApiError(f"cannot reach {self._http.base_url}: {error or type(error).__name__}") from error
        if response.is_error:
            raise _error(response)
        return response


def _job(job_id: str) -> str:
    return "/v1/fine_tuning/jobs/" + quote(job_id, safe="")


def _decoded(response: httpx.Response) -> Json:
    try:
        value = response.json()
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ApiError(f"{response.url.path}: the answer is not a JSON object", status=response.status_code)
    return value


def _events(response: httpx.Response, *, done: bool) -> Iterator[Json]:
    for data in data_of(response.iter_bytes()):
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise ApiError(f"{response.url.path}: an event is not JSON", status=response.status_code) from None
        if event.get("error"):
            raise _refusal(event, response)
        yield event
    if done:
        raise ApiError(f"{response.url.path}: the answer was broken off")


def _error(response: httpx.Response) -> ApiError:
    """From either dialect: OpenAI's `{"error": {…}}` or TGI's `{"error", "error_type"}`."""
    try:
        body = response.json()
    except ValueError:
        body = None
    return _refusal(body, response)


def _refusal(body: Any, response: httpx.Response) -> ApiError:
    detail = body.get("error") if isinstance(body, dict) else None
    fields = detail if isinstance(detail, dict) else {"message": detail, "code": None}
    message = str(fields.get("message") or f"HTTP {response.status_code}")
    rows = [f"  line {row.get('line')}: {row.get('message')}" for row in fields.get("errors") or []]
    if [message] == [row.strip() for row in rows]:
        rows = []
    wait = response.headers.get("retry-after", "")
    return ApiError(
        "\n".join([message, *rows[:10], *(["  …"] if len(rows) > 10 else [])]),
        status=response.status_code,
        code=fields.get("code"),
        param=fields.get("param"),
        retry_after=float(wait) if wait.isdecimal() else None,
    )
