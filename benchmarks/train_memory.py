"""peak memory of one training step by sequence length, ours and TRL's, each in a process of its own

`python -m benchmarks.train --memory` prints a table and writes `benchmarks/results/memory.json`. Every step has two
rows of exactly the length; the peak is the process's resident memory from the first step on, the loaded base included.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.train_peers import Task
from examples.stdlib_docstrings import build_dataset, write_rows
from services.trainer.data.dataset import prepare_data
from shared.bases.base_model import prepare_base
from shared.bases.catalogue import load_catalogue
from shared.datasets.tokens import Tokenizer
from shared.jobs.spec import PRESETS, JobSpec
from shared.storage.artifacts import LocalArtifactStore, sha256_of

LENGTHS = (256, 512, 1024, 2048)
PEERS = ("ours_int8", "ours_fp32", "trl_padded", "trl_packed")
ROWS = 2
Json = dict[str, Any]
PeakOf = Callable[[str, Task], float]


def measure(peak_of: PeakOf, peers: Sequence[str], threads: int) -> Json:
    """Peaks in MB by peer and length, and what one more token costs between the shortest and the longest.

    Args:
        peak_of: runs a peer on a task in a process of its own.
    """
    peaks: dict[str, dict[str, int]] = {peer: {} for peer in peers}
    with TemporaryDirectory(prefix="bench-memory-") as folder:
        for task, length in lay_out(Path(folder), threads):
            for peer in peers:
                peaks[peer][str(length)] = round(peak_of(peer, task))
                print(f"{peer}, {length} tokens: {peaks[peer][str(length)]} MB", flush=True)
    tokens = ROWS * (LENGTHS[-1] - LENGTHS[0])
    return {
        "rows_a_step": ROWS,
        "peak_mb": peaks,
        "mb_per_1000_tokens_of_a_step": {
            peer: round(1000 * (by_length[str(LENGTHS[-1])] - by_length[str(LENGTHS[0])]) / tokens)
            for peer, by_length in peaks.items()
        },
    }


def lay_out(root: Path, threads: int) -> list[tuple[Task, int]]:
    """One task of one step for each length."""
    store, base = LocalArtifactStore(root / "artifacts"), load_catalogue().get("smollm2-135m-instruct")
    prepare_base(base, store)
    text = "\n\n".join(row["output"] for row in build_dataset(300, 0)[0])
    # Longer than any of the lengths, so that each row is cut at exactly that many tokens.
    rows = [{"instruction": f"Part {part}?", "output": text[part * 20_000 :][:20_000]} for part in range(ROWS)]
    path = store.file("file-long") / "data"
    path.parent.mkdir(parents=True)
    write_rows(path, rows)
    preset = PRESETS["reference"]
    tasks = []
    for length in LENGTHS:
        one_step = {"max_steps": 1, "n_epochs": 1, "batch_size": ROWS, "max_length": length}
        spec = JobSpec(
            base=base.id,
            base_revision=base.revision,
            training_file="file-long",
            training_sha256=sha256_of(path),
            hyperparameters=preset.hyperparameters.model_copy(update=one_step),
            lora=preset.lora,
            base_precision="fp32",
        )
        data = prepare_data(spec, store, Tokenizer(store.base(base.id)), lambda: None).training
        assert data.lengths.tolist() == [length] * ROWS
        listed = root / f"rows-{length}.json"
        listed.write_text(json.dumps([[part.tolist() for part in data[row]] for row in range(ROWS)]))
        tasks.append((Task(root / "artifacts", base, listed, spec, 1, 1, threads, root), length))
    return tasks


def table(results: Json) -> str:
    """The results for people."""
    lines = [
        f"peak MB of a step of {ROWS} rows" + "".join(f"{length:>8}" for length in LENGTHS) + "   MB / 1,000 tokens"
    ]
    for peer, peaks in results["peak_mb"].items():
        slope = results["mb_per_1000_tokens_of_a_step"][peer]
        lines.append(f"{peer:28}" + "".join(f"{peaks[str(length)]:8}" for length in LENGTHS) + f"{slope:10}")
    return "\n".join(lines)
