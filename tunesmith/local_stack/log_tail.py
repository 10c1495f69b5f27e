"""The end of a log, for a person who has just seen something fail."""

import json
from pathlib import Path

READ_BYTES = 65_536


def log_tail(path: Path, start: int = 0, lines: int = 15) -> str:
    """The last lines written after byte `start`, indented; of a JSON line only its event and traceback."""
    with path.open("rb") as log:
        size = path.stat().st_size
        # Shorter than it was: it was rotated meanwhile.
        log.seek(max(start if start <= size else 0, size - READ_BYTES))
        text = log.read().decode(errors="replace")
    readable = [part for line in text.splitlines() for part in _readable(line).splitlines()]
    return "\n".join(f"  {line[:500]}" for line in readable[-lines:]) or "  (empty)"


def _readable(line: str) -> str:
    try:
        fields = json.loads(line)
        return f"{fields.get('level', 'info')}: {fields['event']}" + "".join(
            f"\n{fields[key]}" for key in ("error", "exception") if key in fields
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return line
