"""Text for a terminal of some width: tables and messages are broken between words, never inside one."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import TextIO

FEWEST_COLUMNS = 20
NEXT = "next: "


def width_of(out: TextIO) -> int | None:
    """Columns of the terminal `out` writes to; None if it is none: what programs read is never broken."""
    import os

    try:
        columns = os.get_terminal_size(out.fileno()).columns if out.isatty() else 0
    except (OSError, ValueError):
        return None
    return max(columns, FEWEST_COLUMNS) if columns else None


def printable(text: str) -> str:
    """Text without control characters: names, messages and logs come from others, and a terminal would act on them."""
    return "".join(character if character.isprintable() else " " for character in text)


def message(text: str, width: int | None, indent: str = "") -> str:
    """Lines of at most `width` columns, but for words that are longer, and for a command to be copied (`next: …`).

    Args:
        indent: what lines begin with that go on with the one before.
    """
    if width is None:
        return text
    return "\n".join(part for line in text.split("\n") for part in _wrapped(line, width, indent))


def _wrapped(line: str, width: int, indent: str) -> list[str]:
    if line.startswith(NEXT):
        return [line]
    wrapped = textwrap.TextWrapper(width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return wrapped.wrap(line) or [line]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], width: int | None) -> str:
    """Columns as wide as their content; where they do not fit, each row as its first cell and its others, named.

    Args:
        rows: cells as text without line breaks, as many a row as the header has.
        width: columns of the terminal; None for no limit.
    """
    texts = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(header))]
    if width is None or sum(widths) + 2 * (len(widths) - 1) <= width:
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in texts)
        return "".join(line + "\n" for line in lines)
    return "".join(_record(header, row, width) for row in texts[1:])


def _record(header: Sequence[str], row: Sequence[str], width: int) -> str:
    lines, line = [row[0]], ""
    for name, cell in zip(header[1:], row[1:], strict=True):
        if cell == "-":
            continue
        item = f"  {name} {cell}"
        if line and len(line) + len(item) > width:
            lines.append(line)
            line = ""
        line += item
    return "".join(each + "\n" for each in [*lines, *([line] if line else [])])
