"""Runs a vLLM server for one prepared base, by the Python of vLLM's own environment: `python vllm_server.py`.

vLLM pins other versions of transformers and fastapi than this project, so nothing but the standard library is imported
here. It reads the variables that the inference process beside it reads, and waits until that has prepared the base.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

DTYPES = {"": "bfloat16", "auto": "bfloat16", "bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
# vLLM's own list of `--max-lora-rank`.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
MOST_RANK = "64"
SLOTS = "16"
# Adapters that one batch may mix; vLLM reserves memory for each at the largest rank.
MOST_IN_A_BATCH = 16
# The most that a client may ask for.
MOST_LOGPROBS = 20


def command(environ: Mapping[str, str], folder: Path) -> list[str]:
    """vLLM's command line for a prepared base.

    Args:
        environ: `TUNESMITH_INFERENCE_*`, and `TUNESMITH_VLLM_ARGUMENTS` with what else vLLM is to be told.

    Raises:
        SystemExit: a variable has a value that vLLM cannot serve; the message names it.
    """
    config = json.loads((folder / "config.json").read_text())
    url = urlsplit(_given(environ, "VLLM_URL", "http://127.0.0.1:8200"))
    adapters, rank = int(_given(environ, "ADAPTER_SLOTS", "32")), int(_given(environ, "MAX_RANK", MOST_RANK))
    precision = _given(environ, "PRECISION", "")
    if precision not in DTYPES:
        raise SystemExit(f"TUNESMITH_INFERENCE_PRECISION={precision}: vLLM serves fp32, bf16 and fp16")
    if rank > RANKS[-1]:
        raise SystemExit(f"TUNESMITH_INFERENCE_MAX_RANK={rank}: vLLM's largest rank is {RANKS[-1]}")
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--host", url.hostname or "127.0.0.1", "--port", str(url.port or 80)),
        *("--model", str(folder), "--served-model-name", _given(environ, "BASE", "")),
        *("--dtype", DTYPES[precision]),
        *("--max-model-len", str(min(int(_given(environ, "CONTEXT", "2048")), config["max_position_embeddings"]))),
        *("--max-num-seqs", _given(environ, "SLOTS", SLOTS)),
        *("--enable-lora", "--max-lora-rank", str(next(each for each in RANKS if each >= rank))),
        *("--max-loras", str(min(adapters, MOST_IN_A_BATCH)), "--max-cpu-loras", str(adapters)),
        *("--max-logprobs", str(MOST_LOGPROBS)),
        # Sampling is what a request says; a repository's own preferences would change it unseen.
        *("--generation-config", "vllm"),
        *("--structured-outputs-config", json.dumps({"backend": "guidance"})),
        "--disable-uvicorn-access-log",
        *environ.get("TUNESMITH_VLLM_ARGUMENTS", "").split(),
    ]


def _given(environ: Mapping[str, str], name: str, default: str) -> str:
    return environ.get(f"TUNESMITH_INFERENCE_{name}") or default


def main() -> None:
    """Wait for the base, and become vLLM."""
    base = os.environ.get("TUNESMITH_INFERENCE_BASE", "")
    artifacts = os.environ.get("TUNESMITH_ARTIFACTS") or os.path.join(os.environ["TUNESMITH_HOME"], "artifacts")
    folder = Path(artifacts) / "bases" / f"base-{base}"
    told = False
    # The manifest is written last.
    while not (folder / "manifest.json").is_file():
        if not told:
            print(f"waiting for the base {base!r} (an id of the catalogue, no alias) in {folder}", flush=True)
            told = True
        time.sleep(1)
    arguments = command(os.environ, folder)
    environ = dict(os.environ) | {
        # Adapters are loaded while it runs; it listens on loopback only, and names are given once.
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Everything is there.
        "HF_HUB_OFFLINE": "1",
    }
    print(" ".join(arguments), flush=True)
    os.execve(arguments[0], arguments, environ)  # noqa: S606 -- no shell is wanted


if __name__ == "__main__":
    main()
