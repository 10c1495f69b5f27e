"""`python -m benchmarks.train_versions OTHER_CHECKOUT`: this checkout's training beside another's, in turns.

All train the same rows in the same order, two steps a round. Writes nothing but a table.
"""

import sys
import tempfile
from pathlib import Path

from benchmarks.versions import show, start, take_turns

FIGURES = (("fp32",), ("int8",))
ROUNDS = 5


def main() -> None:
    other = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory(prefix="tunesmith-bench-") as folder:
        speeds = take_turns(start(other, Path(folder), "train_one_version.py", str(ROUNDS + 1)), FIGURES, ROUNDS)
    show(f"tokens/s, medians of {ROUNDS} rounds", ("base",), speeds)


if __name__ == "__main__":
    main()
