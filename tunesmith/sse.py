"""Server-sent events out of bytes (WHATWG HTML, "Server-sent events"), as far as our services send them."""

from collections.abc import Iterable, Iterator


def data_of(chunks: Iterable[bytes]) -> Iterator[str]:
    """The data of each event, however the bytes were cut.

    httpx's own `iter_lines` also breaks at U+2028 and the like, which JSON may hold unescaped.
    """
    data: list[str] = []
    for line in _lines(chunks):
        if not line and data:
            yield "\n".join(data)
            data = []
        field, _, value = line.partition(":")
        if field == "data":
            data.append(value.removeprefix(" "))


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r").decode(errors="replace")
