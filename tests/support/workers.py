"""Worker processes for tests: started, watched, killed with their children, and never left behind."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import sqlalchemy as sa

from tests.support.databases import is_locked
from tests.support.shop import READY
from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
READY_SECONDS, EXIT_SECONDS = 40.0, 30.0

_numbers = itertools.count(1)


class Worker:
    """One ``celery worker`` process with its children, in a session of its own, its output in a file."""

    def __init__(
        self, environment: Mapping[str, str], directory: Path, *options: str, app: str = "tests.support.shop_worker"
    ) -> None:
        self.name = f"worker-{os.getpid()}-{next(_numbers)}"
        self.log = directory / f"{self.name}.log"
        self.ready = directory / f"{self.name}.ready"
        command = [sys.executable, "-m", "celery", "-A", app, "worker", "-n", f"{self.name}@%h"]
        command += ["-c", "2", "--without-mingle", "--without-gossip", "--loglevel", "INFO", *options]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **environment, READY: str(self.ready)},
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_ready(self) -> None:
        """Waits until it takes messages; shows its log if it dies instead."""

        def ready() -> bool:
            assert self.process.poll() is None, f"the worker died with {self.process.returncode}:\n{self.output}"
            return self.ready.exists()

        until(ready, f"{self.name} is ready", within_seconds=READY_SECONDS)

    def wait_exit(self, seconds: float = EXIT_SECONDS) -> int:
        """Waits until it ends by itself; gives its exit code."""
        return self.process.wait(seconds)

    def children(self) -> list[int]:
        """Its child processes; they would outlive it."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def kill(self) -> list[int]:
        """kill -9 of parent and children at once; gives the processes that died."""
        # The parent first is stopped only, for it would put new children in the place of those that die.
        self.process.send_signal(signal.SIGSTOP)
        pids = [*self.children(), self.process.pid]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
        until(lambda: not any(is_alive(pid) for pid in pids), "the worker's processes are dead")
        return pids

    def freeze(self) -> list[int]:
        """SIGSTOP of parent and children; gives the processes that stand still."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        pids = [self.process.pid, *self.children()]
        until(lambda: all(state_of(pid) == "T" for pid in pids), "the worker's processes stand still")
        return pids

    def freeze_between_writes(self, database: sa.URL) -> list[int]:
        """:meth:`freeze`, at a moment when none of them is SQLite's one writer: that would stop all others, too."""

        def frozen() -> list[int]:
            pids = self.freeze()
            if database.get_backend_name() == "sqlite" and is_locked(database):
                self.thaw()
                return []
            return pids

        return until(frozen, "the worker stands still, and others can write")

    def thaw(self) -> None:
        """SIGCONT of parent and children."""
        os.killpg(self.process.pid, signal.SIGCONT)

    def terminate(self) -> None:
        """Asks it to stop: it ends what runs, and takes nothing more."""
        self.process.terminate()

    def end(self) -> None:
        """None of its processes is left, however it is doing."""
        if self.process.poll() is None:
            self.kill()
        with suppress(ProcessLookupError):  # children that outlived their parent
            os.killpg(self.process.pid, signal.SIGKILL)


class Beat:
    """One ``celery beat`` process, its output in a file."""

    def __init__(self, environment: Mapping[str, str], directory: Path, schedule: Path) -> None:
        self.name = f"beat-{os.getpid()}-{next(_numbers)}"
        self.log = directory / f"{self.name}.log"
        command = [sys.executable, "-m", "celery", "-A", "tests.support.shop_worker", "beat", "--loglevel", "INFO"]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--schedule", str(schedule), "--pidfile="],
                cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment},
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def sent(self, task: str) -> int:
        """How often it has sent this task."""
        assert self.process.poll() is None, f"beat died with {self.process.returncode}:\n{self.output}"
        return sum("Sending due task" in line and f"({task})" in line for line in self.output.splitlines())

    def end(self) -> None:
        """It is not left."""
        self.process.kill()
        self.process.wait(10)


def is_alive(pid: int) -> bool:
    """Whether this process runs; one that died and was not waited for does not."""
    return state_of(pid) not in ("", "Z", "X")


def state_of(pid: int) -> str:
    """A process's state as the kernel has it: "T" stands still; nothing, if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return stat.rpartition(")")[2].split()[0]
