"""A TCP proxy in front of PostgreSQL that breaks one connection at a chosen statement, before or after it ran."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

import sqlalchemy as sa

READY = b"Z\x00\x00\x00\x05"  # ReadyForQuery: the statement has run, and, outside a transaction, has committed
COMMIT = "COMMIT\0"  # not the one in "READ COMMITTED"


class Proxy:
    """Passes everything on, until the statement comes that it was told to break at.

    :meth:`lose_reply` lets the server run it and keeps the answer; :meth:`lose_request` keeps it from the server.
    Either strikes once, closes that connection on both sides, and counts in ``struck``. The statement's text must be in
    the message: so TLS is off, and it must not have run five times on one connection (psycopg then sends but its name).
    """

    def __init__(self, url: str) -> None:
        self._server = sa.make_url(url)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._reply: bytes | None = None
        self._request: bytes | None = None
        self.struck = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    @property
    def url(self) -> str:
        """The database's URL, by way of this proxy."""
        plain = {"sslmode": "disable", "gssencmode": "disable"}
        here = self._server.set(host="127.0.0.1", port=self._listener.getsockname()[1], query=plain)
        return here.render_as_string(hide_password=False)

    def lose_reply(self, statement: str) -> None:
        self._reply = statement.encode()

    def lose_request(self, statement: str) -> None:
        self._request = statement.encode()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            server = self._connect()
            keeps_reply = threading.Event()
            threading.Thread(target=self._to_server, args=(client, server, keeps_reply), daemon=True).start()
            threading.Thread(target=self._to_client, args=(server, client, keeps_reply), daemon=True).start()

    def _connect(self) -> socket.socket:
        folder, port = self._server.query.get("host"), self._server.port or 5432
        if isinstance(folder, str) and folder.startswith("/"):
            server = socket.socket(socket.AF_UNIX)
            server.connect(f"{folder}/.s.PGSQL.{port}")
            return server
        return socket.create_connection((self._server.host or "127.0.0.1", port))

    def _to_server(self, client: socket.socket, server: socket.socket, keeps_reply: threading.Event) -> None:
        with _closing(client, server):
            while message := client.recv(1 << 16):
                if self._request is not None and self._request in message:
                    self._request = None
                    self.struck += 1
                    return
                if self._reply is not None and self._reply in message:
                    self._reply = None
                    keeps_reply.set()
                server.sendall(message)

    def _to_client(self, server: socket.socket, client: socket.socket, keeps_reply: threading.Event) -> None:
        with _closing(client, server):
            while message := server.recv(1 << 16):
                if not keeps_reply.is_set():
                    client.sendall(message)
                elif READY in message:
                    self.struck += 1
                    return


@contextmanager
def _closing(*sockets: socket.socket) -> Iterator[None]:
    """Ends both connections, whichever side ended first."""
    with suppress(OSError):  # the other thread closed them meanwhile
        yield
    for each in sockets:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()
