"""The soak's processes: two workers and two beats, watched as a supervisor does: what has died is started again."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from celery_flows.worker.embedded import Processes, await_fact, last_words
from tests.soak.verdict import Stop
from tests.support.workers import is_alive

WORKERS, BEATS = ("worker-1", "worker-2"), ("beat-1", "beat-2")
CELERY = (sys.executable, "-m", "celery", "-A", "tests.soak.program")
READY_SECONDS = 60.0
GOODBYE_SECONDS = 60.0  # a worker that was told to stop has ended by then, or hangs


@dataclass
class Stage:
    """Workers and beats, and what the monkey did to them that is to be taken back."""

    processes: Processes
    stops: list[Stop] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)  # told to stop, and did not
    restarts: Counter[str] = field(default_factory=Counter)  # how each ended
    deaths: list[str] = field(default_factory=list)  # of workers and beats that nobody had struck
    _stopped: dict[int, tuple[float, float]] = field(default_factory=dict)  # process → since when, until when
    _told: dict[str, float] = field(default_factory=dict)  # worker → by when it must have ended
    _struck: set[str] = field(default_factory=set)
    _sessions: set[int] = field(default_factory=set)
    _thawing: threading.Lock = field(default_factory=threading.Lock)
    _closed: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        # Not in tick(): whoever calls that may wait for a database whose lock a stopped process holds.
        threading.Thread(target=self._thaw_when_due, name="soak thaw", daemon=True).start()

    def start(self) -> None:
        """Starts them all; the workers take messages when this returns."""
        for name in (*WORKERS, *BEATS):
            self._start(name)
        for name in WORKERS:
            log = self.processes.log_of(name)
            child = self.processes.children[name]
            await_fact(lambda log=log: b" ready." in log.read_bytes(), child, log, READY_SECONDS)  # type: ignore[misc]

    def tick(self) -> None:
        """Starts again what has ended."""
        now = time.time()
        for name, deadline in list(self._told.items()):
            if now > deadline and self.processes.children[name].poll() is None:
                self.hung.append(f"{name} has not ended {GOODBYE_SECONDS:g} s after it was told to")
                self.kill(name)
        for name, code in self.processes.dead().items():
            assert name in (*WORKERS, *BEATS), f"{name} ended by itself with {code}"
            self._ended(name, code)
            self._start(name)

    def _ended(self, name: str, code: int) -> None:
        self.restarts[f"{name.partition('-')[0]} {code}"] += 1
        if name not in self._struck:
            self.deaths.append(f"{name} ended by itself with {code}{last_words(self.processes.log_of(name), 3)}")
        self._struck.discard(name)
        self._told.pop(name, None)

    def _start(self, name: str) -> None:
        child = self.processes.start(name, [*CELERY, *self._arguments(name)])
        self._sessions.add(child.pid)

    def _arguments(self, name: str) -> list[str]:
        if name in BEATS:
            return ["beat", "--schedule", str(self.processes.directory / name), "--loglevel", "info"]
        options = ["--concurrency", "4", "--without-gossip", "--without-mingle", "--loglevel", "info"]
        return ["worker", "--hostname", f"{name}@%h", *options]

    # ---- what strikes ask for ----

    def pid(self, name: str) -> int:
        return self.processes.children[name].pid

    def children(self, name: str) -> list[int]:
        """The processes that a worker has for its tasks."""
        parent = self.pid(name)
        try:
            found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            return []
        return sorted(int(pid) for pid in found)

    def kill(self, name: str) -> list[int]:
        """SIGKILL for a worker, or beat, with its children at once; gives those that died."""
        self._struck.add(name)
        with suppress(ProcessLookupError):
            os.kill(self.pid(name), signal.SIGSTOP)  # else it would put new children in the place of those that die
        pids = [self.pid(name), *self.children(name)]
        self.processes.kill(name)
        self.processes.children[name].wait()
        return [pid for pid in pids if dies(pid)]

    def kill_parent(self, name: str) -> bool:
        """SIGKILL for a worker, but not for its children; whether it died."""
        self._struck.add(name)
        self.processes.children[name].kill()
        return self.processes.children[name].wait() == -signal.SIGKILL

    def tell(self, name: str, number: signal.Signals) -> bool:
        """Tells a worker to stop; False: it has been told already, or is not there."""
        if name in self._told or self.processes.children[name].poll() is not None:
            return False
        self._struck.add(name)
        self._told[name] = time.time() + GOODBYE_SECONDS
        self.processes.children[name].send_signal(number)
        return True

    def stop(self, pids: Iterable[int], seconds: float) -> list[int]:
        """SIGSTOP for processes, for so many seconds; gives those that really stopped."""
        since = time.time()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        stopped = [pid for pid in pids if comes_to(pid, "T")]
        with self._thawing:
            self._stopped |= {pid: (self._stopped.get(pid, (since, since))[0], since + seconds) for pid in stopped}
        return stopped

    def _thaw_when_due(self) -> None:
        while not self._closed.wait(0.05):
            self.thaw(until=time.time())

    def thaw(self, until: float = math.inf) -> None:
        """Lets those go on whose time is over by then; if none is given, all."""
        with self._thawing:
            for pid in [pid for pid, (_, end) in self._stopped.items() if end <= until]:
                since, _ = self._stopped.pop(pid)
                self.stops.append(Stop(pid, since, time.time()))
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    # ---- the end ----

    def close(self) -> None:
        """Ends everything that was started here, children that outlived their parents too."""
        self._closed.set()
        self.thaw()
        self.processes.stop()
        for pid in self.left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def left(self) -> list[int]:
        """The processes of our sessions that run."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is_ours(pid)]

    def _is_ours(self, pid: int) -> bool:
        with suppress(ProcessLookupError, FileNotFoundError):
            ours = b"tests.soak.program" in Path(f"/proc/{pid}/cmdline").read_bytes()
            return ours and os.getsid(pid) in self._sessions and is_alive(pid)
        return False


def dies(pid: int, within_seconds: float = 5.0) -> bool:
    """Whether a process is dead, at once or soon."""
    deadline = time.monotonic() + within_seconds
    while is_alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def comes_to(pid: int, state: str, within_seconds: float = 1.0) -> bool:
    """Whether a process comes to this state (proc(5)) soon."""
    deadline = time.monotonic() + within_seconds
    while time.monotonic() < deadline:
        try:
            found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if found == state:
            return True
        time.sleep(0.002)
    return False
