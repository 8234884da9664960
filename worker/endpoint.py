"""What a worker answers over HTTP: /metrics, /healthz and /readyz."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from celery_flows.store import InvalidData
from celery_flows.tasks.runtime import Runtime
from celery_flows.worker import doctor
from celery_flows.worker.gauges import Gauges
from celery_flows.worker.kept import Kept
from celery_flows.worker.tallies import Tallies

log = logging.getLogger("celery_flows.endpoint")

READY_SECONDS = 10.0  # for which an examination holds
CLIENT_SECONDS = 10.0  # for a client to say what it wants

Answer = tuple[int, str, bytes]  # status, content type, body
PLAIN = "text/plain; charset=utf-8"


class Endpoint:
    """Listens from when it is made, answers from :meth:`start` on, in threads of this process.

    Raises:
        InvalidData: the port is taken, or the address is not this machine's.
    """

    def __init__(self, runtime: Runtime, tallies: Tallies, port: int) -> None:
        self.tallies = tallies
        self._registry = CollectorRegistry()
        self._registry.register(tallies)
        self._registry.register(Gauges(runtime))
        self._readiness = Kept(lambda: _examine(runtime), READY_SECONDS)
        self._server = _listen(runtime.settings.metrics_address, port, self._answer)
        refer = weakref.WeakMethod(self._after_fork)
        os.register_at_fork(after_in_child=lambda: (after := refer()) and after())

    def start(self) -> None:
        """Begins to answer."""
        address, port = self._server.server_address[:2]
        log.info("metrics are at http://%s:%d/metrics", address, port)
        threading.Thread(target=self._server.serve_forever, name="celery-flows endpoint", daemon=True).start()

    def stop(self) -> None:
        """Ends it, and frees the port."""
        self._server.shutdown()
        self._server.server_close()
        self.tallies.close()

    def _after_fork(self) -> None:
        self._server.socket.close()  # else a child that outlives its parent would keep the port

    def _answer(self, path: str, accept: str) -> Answer:
        if path == "/metrics":
            encode, kind = choose_encoder(accept)
            return 200, kind, encode(self._registry)
        if path == "/healthz":
            return 200, PLAIN, b"ok\n"
        if path == "/readyz":
            problems = self._readiness.get()
            if problems is None:
                return 503, PLAIN, b"not examined yet\n"
            return 503 if problems else 200, PLAIN, "".join(f"{line}\n" for line in problems or ["ok"]).encode()
        return 404, PLAIN, b"there are /metrics, /healthz and /readyz\n"


def _examine(runtime: Runtime) -> list[str]:
    """The kinds of problems that doctor finds, and what they mean; what they are about is for doctor alone to tell."""
    kinds = dict.fromkeys(finding.kind for finding in doctor.examine(runtime) if finding.is_problem)
    return [f"{kind}: {doctor.KINDS[kind].cause}" for kind in kinds]


def _listen(address: str, port: int, answer: Callable[[str, str], Answer]) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        timeout = CLIENT_SECONDS
        server_version = "celery-flows"
        sys_version = ""

        def do_GET(self) -> None:
            try:
                status, kind, body = answer(self.path.partition("?")[0], self.headers.get("Accept", ""))
            except Exception as error:
                log.exception("%s could not be answered", self.path)
                status, kind, body = 500, PLAIN, f"{type(error).__name__}\n".encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            """Not a line for each scrape."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A client that went away is no news."""

    try:
        return Server((address, port), Handler)
    except OSError as error:
        told = f"{port} cannot be listened at on {address} ({error.strerror}): choose another, or 0 for any"
        raise InvalidData("flow_metrics_port", told) from error
