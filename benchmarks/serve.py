"""`python -m benchmarks.serve` (`make bench-serve`): the engine beside its alternatives.

Same machine, process, weights, prompts and number of tokens; rounds alternate between all servers and medians are
reported. Writes `benchmarks/results/serve.json` and prints a table with what each figure must reach.
"""

import os

# As the inference process does, before torch is imported; HF's and PEFT's threads wait in the same way.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import json
import platform
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import serve_http, serve_peers
from benchmarks.serve_engine import EngineBench, percentile
from benchmarks.serve_workload import Workload, make_workload
from services.inference.precision import ServingPrecision
from shared.bases.base_model import library_versions, quiet_libraries
from shared.logs import configure_logging
from shared.processor import this_processor
from tunesmith.output import interrupt_on_sigterm

RESULT = Path("benchmarks/results/serve.json")
CLIENTS, SWAPPED = 16, 8
Json = dict[str, Any]


def main() -> None:
    options = _options()
    interrupt_on_sigterm()
    configure_logging("benchmark", "WARNING")
    quiet_libraries()
    torch.manual_seed(0)
    about = {"machine": machine(), "versions": library_versions(), "options": vars(options) | {"out": None}}
    with tempfile.TemporaryDirectory(prefix="tunesmith-bench-") as folder:
        home = Path(folder)
        work = make_workload(home, options.base, adapters=28, tokens=options.tokens)
        result = measure(work, options.precisions, options.rounds, options.load_seconds) | about
        write(result, options.out)
        if options.http:
            result |= serve_http.measure(
                home,
                options.base,
                result["precision"],
                work.adapters[:SWAPPED],
                requests=options.http,
                seconds=options.http_seconds,
            )
            result["gateway_overhead_ms"] = result["gateway"]["overhead_ms"]["whole"]
            write(result, options.out)
    show(result)


def write(result: Json, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, default=str) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of every request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precisions", nargs="+", default=["auto", "fp32"], help="the first gives the headline ratios")
    parser.add_argument("--load-seconds", type=float, default=18, help="how long streams run beside hot loads")
    parser.add_argument("--http", type=int, default=60, help="requests for the gateway's overhead; 0 leaves HTTP out")
    parser.add_argument("--http-seconds", type=float, default=20, help="how long each stretch of load over HTTP takes")
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args()


def measure(work: Workload, precisions: list[ServingPrecision], rounds: int, load_seconds: float) -> Json:
    """All of it but HTTP."""
    engines = {precision: EngineBench(work, precision) for precision in precisions}
    merged, peft = serve_peers.merged_model(work), serve_peers.peft_model(work, SWAPPED)
    speeds = alternate(measurements(work, engines, merged, peft), rounds)
    agreement = {precision: _agreement(work, engine, merged) for precision, engine in engines.items()}
    headline = engines[precisions[0]]
    loads = headline.loads_beside_streams(work.adapters[16:], streams=SWAPPED, seconds=load_seconds, pause=0.1)
    first = headline.first_token_ms(15)
    served = {precision: engine.precision for precision, engine in engines.items()}
    probed = list(headline.serving.base.measured)
    for engine in engines.values():
        engine.close()
    by_precision = {served[precision]: _ratios(speeds, precision) for precision in engines}
    quiet, during = percentile(loads["quiet"], 0.99), percentile(loads["during"], 0.99)
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": work.loaded.base.id,
        "precision": headline.precision,
        **by_precision[headline.precision],
        "hot_load_ms": {
            "p50": round(percentile(loads["loads"], 0.5), 1),
            "p99": round(percentile(loads["loads"], 0.99), 1),
            "count": len(loads["loads"]),
        },
        "itl_ms": {
            "quiet_p50": round(percentile(loads["quiet"], 0.5), 2),
            "during_load_p50": round(percentile(loads["during"], 0.5), 2),
            "quiet_p99": round(quiet, 2),
            "during_load_p99": round(during, 2),
            "ratio_p99": round(during / quiet, 3),
            "streams": SWAPPED,
        },
        "ttft_ms": round(first, 2),
        "tokens_per_second": {name: round(median(values), 1) for name, values in speeds.items()},
        "by_precision": by_precision,
        "greedy_tokens_equal_to_hf": agreement,
        "probe": probed,
    }


def measurements(
    work: Workload, engines: dict[ServingPrecision, EngineBench], merged: Any, peft: Any
) -> dict[str, Callable[[], float]]:
    """Every figure's name and what measures it once."""
    clients = [(number, work.adapters[number % SWAPPED]) for number in range(CLIENTS)]
    by_adapter = sorted(clients, key=lambda request: request[1])
    table: dict[str, Callable[[], float]] = {}
    for rows in (1, 8, 16, 32):
        table[f"hf batch {rows}"] = partial(serve_peers.batch_speed, merged, work, rows)
    # Four clients are enough: one after another, all sixteen take longer and give the same speed.
    table["peft swap"] = partial(serve_peers.swap_speed, peft, work, clients[:4], 1)
    table["peft swap, requests of one adapter batched"] = partial(
        serve_peers.swap_speed, peft, work, by_adapter[:8], CLIENTS // SWAPPED
    )
    table["peft mixed"] = partial(serve_peers.mixed_speed, peft, work, clients)
    for precision, engine in engines.items():
        for rows, adapters in ((1, 1), (8, 1), (16, 0), (16, 1), (16, 8), (16, 16), (32, 16)):
            name = f"engine {precision} batch {rows} adapters {adapters}"
            table[name] = partial(engine.batch_speed, rows, adapters)
        for adapters in (0, 1, 16):
            name = f"engine {precision} decode {CLIENTS} adapters {adapters}"
            table[name] = partial(engine.decode_speed, CLIENTS, adapters)
        for bound in (0, 1, 8):
            table[f"engine {precision} batch 8, with a grammar {bound}"] = partial(engine.grammar_speed, 8, bound)
    return table


def alternate(table: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """All figures once per round, so that a slow minute of the machine affects all of them; a first round warms up."""
    speeds: dict[str, list[float]] = defaultdict(list)
    for name, once in table.items():
        if name.startswith("engine"):
            once()
    for number in range(rounds):
        for name, once in table.items():
            speeds[name].append(once())
            print(f"round {number + 1}: {name}: {speeds[name][-1]:.1f} tokens/s", file=sys.stderr, flush=True)
    return speeds


def _ratios(speeds: dict[str, list[float]], precision: str) -> Json:
    """Medians of the ratios within each round."""

    def ratio(above: str, below: str) -> float:
        return round(median(a / b for a, b in zip(speeds[above], speeds[below], strict=True)), 3)

    def engine(rows: int, adapters: int, kind: str = "batch") -> str:
        return f"engine {precision} {kind} {rows} adapters {adapters}"

    def grammar_cost(bound: int) -> float:
        name = f"engine {precision} batch 8, with a grammar"
        return round(1 - ratio(f"{name} {bound}", f"{name} 0"), 3)

    return {
        "ratios": {
            "vs_peft_swap": ratio(engine(16, 8), "peft swap"),
            "vs_peft_swap_batched": ratio(engine(16, 8), "peft swap, requests of one adapter batched"),
            "vs_peft_mixed": ratio(engine(16, 8), "peft mixed"),
            "vs_hf_single_stream": ratio(engine(1, 1), "hf batch 1"),
            "vs_hf_batch": ratio(engine(16, 16), "hf batch 16"),
            "vs_hf_batch_32": ratio(engine(32, 16), "hf batch 32"),
        },
        "flatness": ratio(engine(16, 16), engine(16, 1)),
        "lora_cost": round(1 - ratio(engine(16, 1), engine(16, 0)), 3),
        "grammar_cost": {"one_row_of_8": grammar_cost(1), "all_8": grammar_cost(8)},
        "decode_flatness": ratio(engine(16, 16, "decode"), engine(16, 1, "decode")),
        "decode_lora_cost": round(1 - ratio(engine(16, 16, "decode"), engine(16, 0, "decode")), 3),
    }


def _agreement(work: Workload, engine: EngineBench, merged: Any) -> float:
    """Share of rows whose greedy tokens are all HF's; merging rounds weights, so near ties may differ."""
    theirs = serve_peers.generate(merged, [work.prompt(number) for number in range(8)], work.tokens)
    mine = [recording.ids for recording in engine.batch(8, 1)]
    return sum(a == b for a, b in zip(mine, theirs, strict=True)) / len(mine)


def machine() -> Json:
    """What the figures were measured on."""
    return {
        "cpu": this_processor().name,
        "instructions": this_processor().vectors,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        "load_average": os.getloadavg()[0],
    }


def show(result: Json) -> None:
    """The table: what was measured, and what it must reach."""
    console = Console()
    speeds = Table(title=f"tokens/s, medians ({result['base']}, engine first in {result['precision']})")
    speeds.add_column("server")
    speeds.add_column("tokens/s", justify="right")
    for name, value in result["tokens_per_second"].items():
        speeds.add_row(name, f"{value:.0f}")
    console.print(speeds)
    if "http" in result:
        console.print(_http_table(result["http"]))
    musts = Table(title="must")
    for column in ("figure", "measured", "must", ""):
        musts.add_column(column)
    ratios = result["ratios"]
    rows = [
        ("16 clients over 8 adapters ÷ PEFT swapping", ratios["vs_peft_swap"], 5, "≥"),
        ("single stream ÷ HF generate", ratios["vs_hf_single_stream"], 2.5, "≥"),
        ("batch 16 with 16 adapters ÷ HF's 16 with one", ratios["vs_hf_batch"], 2, "≥"),
        ("flatness, 16 adapters ÷ one", result["flatness"], 0.85, "≥"),
        ("hot load r 8, p99 ms", result["hot_load_ms"]["p99"], 100, "≤"),
        ("batch 8, all with a grammar: cost", result["grammar_cost"]["all_8"], 0.15, "≤"),
        ("p99 inter-token time during loads ÷ quiet", result["itl_ms"]["ratio_p99"], 1.3, "≤"),
    ]
    if "gateway_overhead_ms" in result:
        rows.append(("gateway adds, p50 ms", result["gateway_overhead_ms"], 5, "≤"))
    for name, value, bound, sign in rows:
        good = value >= bound if sign == "≥" else value <= bound
        musts.add_row(name, f"{value:g}", f"{sign} {bound:g}", "yes" if good else "NO")
    console.print(musts)


def _http_table(http: Json) -> Table:
    closed = http["closed_loop"]
    table = Table(
        title=f"HTTP, open loop at {http['rate']:g} requests/s of {http['new_tokens']} tokens over {http['adapters']} "
        f"adapters ({closed['clients']} clients in a closed loop: {closed['requests_per_second']:g})"
    )
    columns = ("", "first token ms, p50", "p99", "between tokens ms, p50", "p99", "answered", "refused", "broken")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name in ("direct", "gateway"):
        seen = http[name]
        times = (seen[kind].get(share, float("nan")) for kind in ("ttft_ms", "itl_ms") for share in ("p50", "p99"))
        table.add_row(name, *(f"{time:.1f}" for time in times), *(str(seen[k]) for k in columns[-3:]))
    return table


if __name__ == "__main__":
    main()
