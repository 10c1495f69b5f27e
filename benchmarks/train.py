"""Training speed side by side: the tutorial's recipe, TRL, and ours, in one run on one machine.

`python -m benchmarks.train` prints a table and writes `benchmarks/results/train.json`. Peers take turns, a few steps
at a time, and the median round counts; while one runs, the others wait. Every adapter's held-out loss is computed by
one judge: the fp32 base and our evaluation. `--parity` runs one whole epoch of TRL and ours instead and compares that;
`--memory` measures peaks by sequence length (`benchmarks.train_memory`).
"""

import os

# As the training worker does, before torch is imported; the peers' processes inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import json
import multiprocessing
import platform
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import train_memory
from benchmarks.train_peers import CPU, Report, Round, Task, run_peer
from examples.stdlib_docstrings import build_dataset, write_rows
from services.trainer.data.dataset import Data, prepare_data
from services.trainer.data.layout import plan_layout
from services.trainer.model.bases import WarmBases
from services.trainer.model.lora import lora_loaded
from services.trainer.model.precision import choose_precision
from services.trainer.recipe.evaluate import evaluation_loss
from services.trainer.recipe.metrics import matmul_parameters, measure_peak_flops
from shared.bases.base_model import library_versions, prepare_base, quiet_libraries
from shared.bases.catalogue import Base, Catalogue, load_catalogue
from shared.datasets.tokens import Tokenizer
from shared.jobs.spec import PRESETS, JobSpec
from shared.processor import this_processor
from shared.storage.artifacts import LocalArtifactStore, sha256_of
from shared.training.plan import CPU_TOKEN_BUDGET

RESULTS = Path(__file__).parent / "results"
PEERS = ("tutorial_fp32", "tutorial_int8", "trl_padded", "trl_packed", "ours_fp32", "ours_int8")
LABELS = {
    "tutorial_fp32": "tutorial's recipe + labels, fp32",
    "tutorial_int8": "tutorial's recipe + labels, 8-bit",
    "trl_padded": "TRL, batch 8, dynamic padding",
    "trl_packed": "TRL, packed 1x512",
    "ours_fp32": "Tunesmith fp32",
    "ours_int8": "Tunesmith int8",
}


@dataclass(slots=True)
class Peer:
    """A peer's process and its results."""

    name: str
    pipe: Connection
    process: Any
    rounds: list[Round] = field(default_factory=list)
    report: Report | None = None
    loss: float = float("nan")

    @property
    def rate(self) -> float:
        """Real tokens per second of the median round."""
        return statistics.median(r.tokens / r.seconds for r in self.rounds)

    @property
    def padding(self) -> float:
        """Padding's share of all slots computed on; packed layouts without a count have none."""
        slots = sum(r.slots for r in self.rounds)
        return 1 - sum(r.tokens for r in self.rounds) / slots if slots else 0.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judge's result: the held-out loss of the base alone, and the number of weights in its matrix products."""

    loss_before: float
    matmul_weights: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each round")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--parity", action="store_true", help="one epoch of TRL (padded) and ours, compared by loss")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--memory", action="store_true", help="peak memory of a step by sequence length")
    arguments = parser.parse_args()
    if arguments.memory:
        measure_memory(arguments.peers, arguments.threads)
        return
    rounds, steps, peers = arguments.rounds, arguments.steps, arguments.peers
    if arguments.parity:
        rounds, steps, peers = 1, 38, ["trl_padded", "ours_fp32"]
    quiet_libraries()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        task, data, base = lay_out(Path(folder), rounds * steps, steps, arguments.threads)
        runs, peak = take_turns(peers, task, rounds)
        verdict = judge(runs, task, data, base)
    results = summary(runs, task, data, peak, verdict)
    print(table(results))
    path = RESULTS / "train.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    # Each way of running keeps the results of the other.
    if arguments.parity:
        known["parity"] = parity(results)
        print(known["parity"])
    else:
        known = results | {key: known[key] for key in ("parity",) if key in known}
    write(path, known)


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {path}")


def measure_memory(peers: Sequence[str], threads: int) -> None:
    def peak_of(name: str, task: Task) -> float:
        ((peer,), _) = take_turns([name], task, 1)
        assert peer.report is not None
        return peer.report.peak_memory_mb

    chosen = [peer for peer in train_memory.PEERS if peer in peers]
    path = RESULTS / "memory.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    results = train_memory.measure(peak_of, chosen, threads)
    for key in ("peak_mb", "mb_per_1000_tokens_of_a_step"):
        results[key] = known.get(key, {}) | results[key]
    results |= {"machine": machine(threads), "versions": library_versions()}
    print(train_memory.table(results))
    write(path, results)


def parity(results: dict[str, Any]) -> dict[str, Any]:
    """Whether the same rows in the same order give the same loss with every trainer."""
    losses = {name: peer["held_out_loss"] for name, peer in results["peers"].items()}
    return {
        "steps": results["steps"],
        "held_out_loss_before": round(results["held_out_loss_before"], 4),
        "held_out_loss": losses,
        "difference": round(abs(losses["ours_fp32"] / losses["trl_padded"] - 1), 5),
        "tokens_per_second": {name: peer["tokens_per_second"] for name, peer in results["peers"].items()},
        "machine": results["machine"],
        "versions": results["versions"],
    }


def lay_out(root: Path, max_steps: int, steps_per_round: int, threads: int) -> tuple[Task, Data, Base]:
    """The prepared base, and the rows tokenised and in the order everybody trains them in."""
    store, base = LocalArtifactStore(root / "artifacts"), load_catalogue().get("smollm2-135m-instruct")
    prepare_base(base, store)
    preset = PRESETS["reference"]
    hyper = preset.hyperparameters.model_copy(update={"max_steps": max_steps, "n_epochs": 1})
    whole = JobSpec(
        base=base.id,
        base_revision=base.revision,
        hyperparameters=hyper,
        lora=preset.lora,
        base_precision="fp32",
        **docstrings(store),
    )
    data = prepare_data(whole, store, Tokenizer(store.base(base.id)), lambda: None)
    layout = plan_layout(data.training.lengths, hyper, whole.seed, "cpu")
    order = [row for step in range(layout.steps_per_epoch) for row in layout.rows(step)]
    ordered = [[part.tolist() for part in data.training[row]] for row in order]
    (root / "rows.json").write_text(json.dumps(ordered))
    # The judge uses the held-out rows: no peer is to spend time on them.
    spec = whole.model_copy(update={"validation_file": None, "validation_sha256": None})
    task = Task(root / "artifacts", base, root / "rows.json", spec, max_steps, steps_per_round, threads, root)
    return task, data, base


def docstrings(store: LocalArtifactStore) -> dict[str, str]:
    """Write the docstrings to train on and to hold out into a store; returns a `JobSpec`'s fields for the two files."""
    files: dict[str, str] = {}
    for role, rows in zip(("training", "validation"), build_dataset(300, 40), strict=True):
        path = store.file(f"file-{role}") / "data"
        path.parent.mkdir(parents=True)
        write_rows(path, rows)
        files |= {f"{role}_file": f"file-{role}", f"{role}_sha256": sha256_of(path)}
    return files


def take_turns(names: Sequence[str], task: Task, rounds: int) -> tuple[list[Peer], float]:
    """Every peer's rounds, alternating, and the best of the products' FLOP/s measured between them."""
    context = multiprocessing.get_context("spawn")
    peers = []
    for name in names:
        here, there = context.Pipe()
        process = context.Process(target=run_peer, args=(name, task, there), daemon=True)
        process.start()
        # From here on only the peer holds its end: if it dies, reading ours fails at once.
        there.close()
        assert here.recv() == "ready"
        peers.append(Peer(name, here, process))
    peak = 0.0
    for number in range(rounds):
        peak = max(peak, measure_peak_flops(CPU))
        for peer in peers:
            peer.pipe.send("go")
            peer.rounds.append(peer.pipe.recv())
            last = peer.rounds[-1]
            print(f"round {number + 1}: {peer.name} {last.tokens / last.seconds:.1f} tokens/s", flush=True)
    for peer in peers:
        peer.pipe.send("end")
        peer.report = peer.pipe.recv()
        peer.process.join()
    return peers, peak


def judge(peers: Sequence[Peer], task: Task, data: Data, base: Base) -> Verdict:
    """Held-out loss of each peer's adapter on the fp32 base, and the base's own."""
    bases = WarmBases(Catalogue((base,)), LocalArtifactStore(task.store), CPU)
    loaded, _ = bases.load(task.spec, torch.float32)
    precision = choose_precision(task.spec, CPU)
    model, rows = loaded.loaded.model, data.validation
    assert rows is not None
    before = evaluation_loss(model, rows, CPU_TOKEN_BUDGET, precision, lambda: None)
    weights = matmul_parameters(model)
    for peer in peers:
        assert peer.report is not None
        with lora_loaded(model, peer.report.adapter) as adapted:
            peer.loss = evaluation_loss(adapted, rows, CPU_TOKEN_BUDGET, precision, lambda: None)
    return Verdict(before, weights)


def summary(peers: Sequence[Peer], task: Task, data: Data, peak: float, verdict: Verdict) -> dict[str, Any]:
    """Everything measured, as it is written to the results."""
    rates = {peer.name: peer.rate for peer in peers}
    own = {name: name.removeprefix("ours_") for name in rates if name.startswith("ours_")}
    rows = data.training
    return {
        "model": task.catalogue_base.id,
        "rows": {"training": len(rows), "held_out": len(data.validation or [])},
        "supervised_share": float(rows.supervised.sum() / rows.lengths.sum()),
        "steps": task.max_steps,
        "held_out_loss_before": verdict.loss_before,
        "peers": {peer.name: _as_json(peer, verdict, peak) for peer in peers},
        "ratios": {precision: _ratios(name, rates) for name, precision in own.items()},
        "mfu": {precision: _mfu(rates[name], verdict, peak) for name, precision in own.items()},
        "mfu_formula": "4N FLOP per real token, N the weights of all linear layers and the output head, "
        "of the best fp32 product of 1,536 x 1,536 measured between the rounds",
        "sgemm_gflops": round(peak / 1e9, 1),
        "lora": task.spec.lora.model_dump(mode="json"),
        "hyperparameters": task.spec.hyperparameters.model_dump(mode="json"),
        "machine": machine(task.threads),
        "versions": library_versions(),
    }


def _as_json(peer: Peer, verdict: Verdict, peak: float) -> dict[str, Any]:
    assert peer.report is not None
    startup = peer.report.startup
    return {
        "tokens_per_second": round(peer.rate, 1),
        "rounds": [round(r.tokens / r.seconds, 1) for r in peer.rounds],
        "padding": round(peer.padding, 3),
        "mfu": round(_mfu(peer.rate, verdict, peak), 3),
        "peak_memory_mb": round(peer.report.peak_memory_mb),
        "held_out_loss": round(peer.loss, 4),
        "settings": peer.report.settings,
    } | (
        {"first_job_to_first_step_s": startup[0], "later_job_to_first_step_s": statistics.median(startup[1:])}
        if startup
        else {}
    )


def _mfu(rate: float, verdict: Verdict, peak: float) -> float:
    return 4 * verdict.matmul_weights * rate / peak


def _ratios(name: str, rates: dict[str, float]) -> dict[str, float]:
    """Ours over each peer; the tutorial's recipe is taken in the same precision."""
    precision = name.removeprefix("ours_")
    against = {"vs_tutorial": f"tutorial_{precision}", "vs_trl_padded": "trl_padded", "vs_trl_packed": "trl_packed"}
    if precision != "fp32":
        against["vs_fp32"] = "ours_fp32"
    return {key: round(rates[name] / rates[peer], 2) for key, peer in against.items() if peer in rates}


def machine(threads: int) -> dict[str, Any]:
    return {"cpu": str(this_processor()), "cores": os.cpu_count(), "threads": threads, "system": platform.platform()}


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    lines = [
        f"{results['model']}, {results['steps']} steps of 8 rows, held-out loss before "
        f"{results['held_out_loss_before']:.4f}, sgemm peak {results['sgemm_gflops']} GFLOP/s",
        f"{'':36}{'tokens/s':>9}{'padding':>9}{'MFU':>7}{'peak MB':>9}{'held-out':>10}",
    ]
    for name, peer in results["peers"].items():
        lines.append(
            f"{LABELS[name]:36}{peer['tokens_per_second']:9.1f}{peer['padding']:9.0%}{peer['mfu']:7.0%}"
            f"{peer['peak_memory_mb']:9}{peer['held_out_loss']:10.4f}"
        )
    lines += [f"{LABELS[name]}: {peer['settings']}" for name, peer in results["peers"].items()]
    lines += [f"{precision}: {ratios}" for precision, ratios in results["ratios"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
