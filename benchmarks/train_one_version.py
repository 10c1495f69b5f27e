"""One checkout's training for `benchmarks.train_versions`: a script that imports whatever checkout PYTHONPATH names.

Reads `[precision]` by line, trains two steps on a base of it, and answers with tokens per second. Uses only what past
versions have too.
"""

import json
import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

# As the training worker does, before torch is imported; the processes that train inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

STEPS = 2


def main() -> None:
    from benchmarks.train import lay_out
    from benchmarks.train_peers import run_peer
    from shared.bases.base_model import quiet_libraries

    quiet_libraries()
    home, rounds = Path(sys.argv[1]), int(sys.argv[2])
    home.mkdir()
    # One round more than are asked for: nobody waits for the end.
    task, _, _ = lay_out(home, STEPS * (rounds + 1), STEPS, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for precision in ("fp32", "int8"):
        pipes[precision], there = context.Pipe()
        process = context.Process(target=run_peer, args=(f"ours_{precision}", task, there), daemon=True)
        process.start()
        there.close()
        assert pipes[precision].recv() == "ready"
        processes.append(process)
    print("ready", flush=True)
    for line in sys.stdin:
        (precision,) = json.loads(line)
        pipes[precision].send("go")
        done = pipes[precision].recv()
        print(done.tokens / done.seconds, flush=True)
    for process in processes:
        process.kill()
        process.join()


if __name__ == "__main__":
    main()
