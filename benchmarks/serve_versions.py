"""`python -m benchmarks.serve_versions OTHER_CHECKOUT [PRECISION]`: this checkout's engine beside another's, in turns.

Each version's weights are in memory all the time. Writes nothing but a table.
"""

import sys
import tempfile
from pathlib import Path

from benchmarks.versions import show, start, take_turns

# (rows, adapters) of each figure.
FIGURES = ((1, 1), (8, 1), (16, 1), (16, 16), (32, 16))
ROUNDS = 7


def main() -> None:
    other, precision = Path(sys.argv[1]).absolute(), (sys.argv[2:] or ["auto"])[0]
    with tempfile.TemporaryDirectory(prefix="tunesmith-bench-") as folder:
        speeds = take_turns(start(other, Path(folder), "serve_one_version.py", precision), FIGURES, ROUNDS)
    show(f"tokens/s, medians of {ROUNDS} rounds, {precision}", ("rows", "adapters"), speeds)


if __name__ == "__main__":
    main()
