"""The part of a page that is written from the code, between two marks; everything else there is left as it is."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def write_or_check(page: Path, begin: str, end: str, fresh: str) -> int:
    """Put `fresh` between the marks of a page; with `--check` on the command line only say whether it is there.

    Returns:
        The exit status: 1 if the page was to be checked and is stale.
    """
    text = page.read_text()
    before, _, rest = text.partition(begin)
    wanted = f"{before}{begin}{fresh}{end}{rest.partition(end)[2]}"
    if sys.argv[1:] != ["--check"]:
        page.write_text(wanted)
        return 0
    if wanted != text:
        print(f"{page.relative_to(ROOT)} is stale: run `make docs`", file=sys.stderr)
    return int(wanted != text)
