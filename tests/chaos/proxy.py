"""A TCP proxy before PostgreSQL that goes dark: what is sent waits, as on a network that swallows packets."""

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from tests.stack_processes import free_port

Way = Literal["to server", "to client"]
WAYS: tuple[Way, ...] = ("to server", "to client")


class DarkProxy:
    """Relays to a server's Unix socket, until `close`.

    Attributes:
        port: where it listens, on the loopback interface.
    """

    def __init__(self, target: Path) -> None:
        self.port = free_port()
        self._target = str(target)
        self._light = {way: threading.Event() for way in WAYS}
        for light in self._light.values():
            light.set()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @contextmanager
    def dark(self, *ways: Way) -> Iterator[None]:
        """Nothing gets through these ways meanwhile; afterwards what waited does."""
        for way in ways:
            self._light[way].clear()
        try:
            yield
        finally:
            for way in ways:
                self._light[way].set()

    def cut(self) -> None:
        """Break off every connection; what waits is lost."""
        for one in list(self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for light in self._light.values():
            light.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(self._target)
            except OSError:
                client.close()
                server.close()
                continue
            pair = (client, server)
            self._open |= set(pair)
            for way, source, target in (("to server", client, server), ("to client", server, client)):
                threading.Thread(target=self._relay, args=(way, source, target, pair), daemon=True).start()

    def _relay(self, way: Way, source: socket.socket, target: socket.socket, pair: Sequence[socket.socket]) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._light[way].wait()
                target.sendall(data)
        for one in pair:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        # Each of the two directions comes here; the second closes.
        if source in self._open and target in self._open:
            self._open -= set(pair)
        else:
            for one in pair:
                one.close()
