"""Words this project no longer uses: field-standard terms stand in their place, in code, messages and docs.

`WORDS` are looked for in lower case with identifiers taken apart, so that `MAX_RINGS` and `ringAgain` hold one and
`strings` holds none. Ordinary words that were terms only in one form are in `SPELLINGS`, looked for as they stand.
"""

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HERE = str(Path(__file__).relative_to(ROOT))
SUFFIXES = (".py", ".md", ".toml", ".yml", ".yaml", ".sh", ".mako", "file", "example", ".ci/run")
# Generated, measured, fixed by others, or a record of what once was.
NOT_READ = ("openapi/", "benchmarks/results/", "shared/migrations/versions/", "LICENSE", HERE)

# A regular expression → what is said instead.
WORDS = {
    r"doorbells?|bell|rings?|ringing|ringer|rang|rung": "notification, notify",
    r"wish|wishes|wished": "requested action; requested",
    r"patiently|patient|patience": "retry, timeout (patience is early stopping's)",
    r"gently": "protect_recent_seconds",
    r"pulse": "health cache, health check",
    r"twins?": "duplicate request",
    r"sweeper|sweeps|swept|sweeping": "garbage collector, collect",
    r"news|story|stories|tell about": "events, event log, report",
    r"affairs?": "X owns, X does",
    r"told from outside": "X's settings",
    r"next tenant|on its way in|he may be gone": "plain words",
    r"asked protocol|close unread": "backpressure, close on unread body",
    r"kept bytes|widen|widens|widened|widening": "saved activation bytes; dequantise",
    r"base facts": "base metadata",
    r"paces?": "throughput, ETA",
    r"work off|works off": "drain the queue",
    r"assembly": "composition root",
    r"in the family": "architecture",
}
PERMITS = r"\bclass (Place|Ask|Run)\b|\bplace\.leave\b|admission\.enter\b"
TENSORS = r"\bto_x\b|\b(said|turned|narrow)( =|,|\))"
SPELLINGS = {
    r"\bMAX_LOSSES\b|\.losses\b|\"losses\"|\.lose\(": "worker_failures, MAX_ATTEMPTS, requeue",
    r"\bAnswered\b|\bclass Answers?\b|\bservices\.answers\b": "IdempotencyStore, StoredResponse",
    r"\b(guard|seal)(=|: Callable)": "nothing calls back into a transaction",
    r"\blet_go\b|\bgive_up\b": "release, abort",
    PERMITS: "Permit, a request, a generation",
    r"(?<!report)\.tokens_at_once\b|def tokens_at_once\b|tokens_at_once: int = 0": "largest_micro_batch_tokens",
    r"\b[Uu]pcast[A-Z_.]|\bupcast import\b": "mixed precision",
    r"\btests\.site\b|\btests import site\b": "deployment",
    r"\.feel\(": "check",
    TENSORS: "grad_x, attn_output, rotated, lora_hidden",
}
TENSOR_CODE = ("services/trainer/model/", "services/inference/engine/")
ONLY_IN = {PERMITS: ("services/",), TENSORS: TENSOR_CODE}

# (file, what stands there) → why it stays: a name that others hold, or the place that reads an old one.
KEPT = {
    ("shared/jobs/notification.py", "ring"): "the task's name on the wire, which workers of two versions share",
    ("tests/services/trainer/worker/test_celery.py", "ring"): "the same, in a message made by hand",
    ("services/gateway/state_metrics.py", "doorbells"): "the metric's old name, there for one release",
    ("tests/services/gateway/routes/test_operations.py", "doorbells"): "the same, tested",
    ("shared/inference_api/administration.py", "gently"): "the parameter's old name, read for one release",
    ("CHANGELOG.md", "doorbells"): "the upgrade note names what is renamed",
    ("CHANGELOG.md", "gently"): "the upgrade note names what is renamed",
    ("tests/shared/storage/test_migrations.py", '"losses"'): "the column before migration 0003",
    ("services/trainer/recipe/context.py", "patience"): "early stopping's",
    ("tests/services/trainer/recipe/test_early_stopping.py", "patience"): "early stopping's",
}
EARLY_STOPPING = re.compile(r"early[ _]stopping[ _]patience|patience is early stopping's")


def read() -> Iterator[tuple[str, list[str]]]:
    """(path, lines) of every text in the repository that people write."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if name.endswith(SUFFIXES) and not name.startswith(NOT_READ) and (ROOT / name).is_file():
            yield name, [name, *(ROOT / name).read_text().splitlines()]


TEXTS = dict(read())


def taken_apart(line: str) -> str:
    """In lower case, with spaces between an identifier's words."""
    line = EARLY_STOPPING.sub("", line).replace("_", " ")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", line).lower()


@cache
def texts_taken_apart() -> dict[str, list[str]]:
    """All texts, once for all patterns."""
    return {name: [taken_apart(line) for line in lines] for name, lines in TEXTS.items()}


def uses(pattern: str) -> list[str]:
    """Where it stands; line 0 is the file's own name."""
    texts = texts_taken_apart() if pattern in WORDS else TEXTS
    words = re.compile(rf"(?<![a-z])(?:{pattern})(?![a-z])") if pattern in WORDS else re.compile(pattern)
    found = []
    for name, lines in texts.items():
        if not name.startswith(ONLY_IN.get(pattern, "")):
            continue
        for number, line in enumerate(lines):
            for match in words.finditer(line):
                if (name, match[0]) not in KEPT:
                    found.append(f"{name}:{number}: {TEXTS[name][number].strip()[:100]}")
    return found


def test_the_texts_were_read() -> None:
    assert {"README.md", "Makefile", "docker-compose.yml", "shared/errors.py", "tests/conftest.py"} <= set(TEXTS)
    assert taken_apart("MAX_RINGS ringAgain HTTPBell strings") == "max rings ring again http bell strings"


@pytest.mark.parametrize("pattern", [*WORDS, *SPELLINGS])
def test_it_is_not_used(pattern: str) -> None:
    assert uses(pattern) == [], f"say instead: {(WORDS | SPELLINGS)[pattern]}"


@pytest.mark.parametrize(("name", "word"), KEPT)
def test_what_is_kept_is_still_there(name: str, word: str) -> None:
    assert any(word in taken_apart(line) or word in line for line in TEXTS[name])
