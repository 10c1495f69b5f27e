"""What a job has measured, step by step, for people and for spreadsheets: a table, CSV, a curve in the terminal."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]
COLUMNS = ("step", "epoch", "loss", "held-out", "rate", "tokens/s")
_NAMES = ("step", "epoch", "train_loss", "valid_loss", "learning_rate", "tokens_per_second")
HEIGHT = 16


def rows_of(points: Sequence[Json]) -> list[tuple[str | None, ...]]:
    """Points as cells under `COLUMNS`, numbers with at most five digits."""
    return [tuple(_cell(point.get(name)) for name in _NAMES) for point in points]


def as_csv(points: Sequence[Json]) -> str:
    """All that was measured: a header with every name that occurs, `step` first; numbers unrounded."""
    names = dict.fromkeys(["step", *(name for point in points for name in point)])
    out = io.StringIO()
    writer = csv.DictWriter(out, list(names), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(points)
    return out.getvalue()


def drawn(points: Sequence[Json], width: int) -> str:
    """Training and held-out loss by step, without colour.

    Args:
        width: columns it may take.
    """
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(width, HEIGHT)
    plotext.title("loss by step")
    for name, label, marker in (("train_loss", "training", "braille"), ("valid_loss", "held-out", "x")):
        known = [(point["step"], point[name]) for point in points if _finite(point.get(name))]
        if known:
            steps, losses = zip(*known, strict=True)
            plotext.plot(list(steps), list(losses), label=label, marker=marker)
    text: str = plotext.uncolorize(plotext.build())
    plotext.clear_figure()
    return "".join(line.rstrip() + "\n" for line in text.splitlines())


def has_loss(points: Sequence[Json]) -> bool:
    return any(_finite(point.get(name)) for point in points for name in ("train_loss", "valid_loss"))


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _cell(value: float | None) -> str | None:
    return None if value is None else str(value) if isinstance(value, int) else f"{value:.5g}"
