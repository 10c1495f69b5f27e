"""A MOCK of the Hugging Face hub: one dataset over real HTTP, as huggingface_hub asks for it."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote

from tests.tunesmith.answering_server import AnsweringServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "some/data"


class MockHub(AnsweringServer):
    """Answers for `REPO` at `COMMIT`, which `main` and `v1` stand for too; everything else is missing.

    Attributes:
        files: content by name.
        configs: of the dataset's card.
        refuse: the status and the header `x-error-code` that the hub answers downloads with.
        asked: "METHOD /path" of each request.
    """

    def __init__(self, files: dict[str, bytes], configs: Any = None) -> None:
        self.files, self.configs = files, configs
        self.refuse: tuple[int, str] | None = None
        self.asked: list[str] = []
        self.tokens: list[str | None] = []
        super().__init__()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(request.path.partition("?")[0])
        self.asked.append(f"{request.command} {path}")
        self.tokens.append(request.headers.get("authorization"))
        status, headers, body = self._found(path)
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def _found(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if path == f"/api/datasets/{REPO}" or path.startswith(f"/api/datasets/{REPO}/revision/"):
            return self._info(path.partition("/revision/")[2] or "main")
        prefix = f"/datasets/{REPO}/resolve/{COMMIT}/"
        if not path.startswith(prefix):
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if self.refuse:
            return self.refuse[0], {"X-Error-Code": self.refuse[1]}, b"{}"
        content = self.files.get(path.removeprefix(prefix))
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, content

    def _info(self, revision: str) -> tuple[int, dict[str, str], bytes]:
        if revision not in ("main", "v1", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        card = {"license": "mit"} | ({"configs": self.configs} if self.configs else {})
        siblings = [{"rfilename": name} for name in self.files]
        info = {"id": REPO, "sha": COMMIT, "private": False, "gated": False, "downloads": 0, "likes": 0, "tags": []}
        return (
            200,
            {"Content-Type": "application/json"},
            json.dumps(info | {"cardData": card, "siblings": siblings}).encode(),
        )
