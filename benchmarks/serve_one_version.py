"""One checkout's engine for `benchmarks.serve_versions`: a script that imports whatever checkout PYTHONPATH names.

Reads `[rows, adapters]` by line and answers each with tokens per second. Uses only what past versions have too.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

# As the inference process does, before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def main() -> None:
    from benchmarks.serve_engine import EngineBench
    from benchmarks.serve_workload import make_workload
    from shared.bases.base_model import quiet_libraries
    from shared.logs import configure_logging

    configure_logging("benchmark", "WARNING")
    quiet_libraries()
    home, precision = sys.argv[1:]
    precision_name: Any = precision
    engine = EngineBench(make_workload(Path(home), "smollm2-135m-instruct", adapters=16, tokens=32), precision_name)
    print("ready", flush=True)
    for line in sys.stdin:
        print(engine.batch_speed(*json.loads(line)), flush=True)
    engine.close()


if __name__ == "__main__":
    main()
