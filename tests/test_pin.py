"""`make pin`. The registry is a MOCK that answers as Docker Hub does (no network here); pip is real."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from zipfile import ZipFile

import httpx
import pytest

from docker.pin import IMAGES, NotPinned, image_digest, lock_lines, pin_images, resolve
from tests.stack_processes import ROOT, free_port

DIGESTS = {
    "/v2/library/redis/manifests/8-alpine": "sha256:" + "1" * 64,
    "/v2/some/image/manifests/2": "sha256:" + "2" * 64,
    "/v2/library/odd/manifests/1": "none",
}


class Registry(BaseHTTPRequestHandler):
    """Gives a token to everybody, and a manifest to who brings it."""

    def do_GET(self) -> None:
        assert self.path.startswith("/token?service=registry&scope=repository")
        self.reply(200, json.dumps({"token": "open"}).encode())

    def do_HEAD(self) -> None:
        host = self.headers["host"]
        if self.headers.get("authorization") != "Bearer open":
            realm = f'Bearer realm="http://{host}/token",service="registry",scope="repository:x:pull"'
            self.reply(401, b"", {"www-authenticate": realm})
        elif "index" not in self.headers["accept"] or self.path not in DIGESTS:
            self.reply(404, b"")
        else:
            self.reply(200, b"", {"docker-content-digest": DIGESTS[self.path]})

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def registry() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False) as client:
        yield client


def test_the_digest_of_a_tag(registry: str, client: httpx.Client) -> None:
    assert image_digest(client, "redis:8-alpine", registry) == "sha256:" + "1" * 64
    assert image_digest(client, "some/image:2", registry) == "sha256:" + "2" * 64
    for image, reason in (("redis:none", "404"), ("odd:1", "names no digest")):
        with pytest.raises(NotPinned, match=reason):
            image_digest(client, image, registry)
    with pytest.raises(NotPinned, match=r"image redis:8-alpine: .*refused"):
        image_digest(client, "redis:8-alpine", f"http://127.0.0.1:{free_port()}")


def test_files_get_digests_again_each_time_and_keep_what_could_not_be_looked_up(
    registry: str, client: httpx.Client, tmp_path: Path
) -> None:
    compose, recipe = tmp_path / "compose.yml", tmp_path / "Dockerfile"
    before = "a:\n  image: redis:8-alpine\n  other: redis:8-alpine\nb:\n  image: gone:1\n"
    compose.write_text(before)
    recipe.write_text(f"# FROM redis:8-alpine\nFROM some/image:2@sha256:{'0' * 64}\n")
    problems = pin_images(client, [compose, recipe], registry)
    assert len(problems) == 1
    assert problems[0].startswith("image gone:1: ")
    pinned = before.replace("image: redis:8-alpine", f"image: redis:8-alpine@sha256:{'1' * 64}")
    assert compose.read_text() == pinned
    assert recipe.read_text() == f"# FROM redis:8-alpine\nFROM some/image:2@sha256:{'2' * 64}\n"
    pin_images(client, [compose, recipe], registry)
    assert compose.read_text() == pinned


def test_every_image_of_the_project_is_found(client: httpx.Client, tmp_path: Path) -> None:
    files = []
    for source in (ROOT / "docker-compose.yml", *(ROOT / "docker").glob("*.Dockerfile")):
        files.append(tmp_path / source.name)
        files[-1].write_text(source.read_text())
    away = f"http://127.0.0.1:{free_port()}"
    named = {problem.split(": ")[0].removeprefix("image ") for problem in pin_images(client, files, away)}
    assert named == {"redis:8-alpine", "postgres:17-alpine", "python:3.11-slim", "vllm/vllm-openai:v0.32.0"}
    # vLLM's image brings its own packages.
    assert {f"{image}.Dockerfile" for image in (*IMAGES, "vllm")} == {file.name for file in files[1:]}


def test_packages_get_the_hash_of_what_pip_would_install(tmp_path: Path) -> None:
    wheel = tmp_path / "pinned_one-1.5-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        for name, text in {
            "METADATA": "Metadata-Version: 2.1\nName: pinned-one\nVersion: 1.5\n",
            "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }.items():
            archive.writestr(f"pinned_one-1.5.dist-info/{name}", text)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    options = ["--no-index", "--find-links", str(tmp_path)]
    assert resolve([*options, "pinned-one"]) == [f"pinned-one==1.5 --hash=sha256:{digest}"]
    with pytest.raises(NotPinned, match="No matching distribution"):
        resolve([*options, "absent-one"])


def test_a_package_without_a_hash_is_no_pin() -> None:
    package = {"metadata": {"name": "a", "version": "1"}, "download_info": {"vcs_info": {}}}
    with pytest.raises(NotPinned, match="package a"):
        lock_lines({"install": [package]})
    itself = {"metadata": {"name": "tunesmith", "version": "1"}, "download_info": {"dir_info": {}}}
    assert lock_lines({"install": [itself]}) == []
