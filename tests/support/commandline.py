"""Commands as a user gives them: in a folder of theirs, with nothing set that they did not set, as processes."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.waiting import until

if TYPE_CHECKING:
    from tests.support.warm import WarmCelery

ROOT = Path(__file__).parents[2]
CELERY = (sys.executable, "-m", "celery")
DEV = (sys.executable, "-m", "celery_flows.worker", "dev")
RUN_SECONDS = 60.0


def environment(**given: str) -> dict[str, str]:
    """This process's environment without what may be set for us or for Celery, and with what is given."""
    ours = ("FLOW_", "CELERY_", "TEST_", "PYTEST_", "PYTHON")
    return {key: value for key, value in os.environ.items() if not key.startswith(ours)} | given


@dataclass(frozen=True)
class Project:
    """A user's folder, and what is set in their shell."""

    folder: Path
    settings: dict[str, str]
    warm: WarmCelery | None = None  # what runs celery's own commands, if they need not start cold

    def but(self, **settings: str | None) -> Project:
        """The same with other settings; None: not set."""
        changed = {**self.settings, **settings}
        return replace(self, settings={key: value for key, value in changed.items() if value is not None})

    def run(self, *command: str, input: str = "") -> subprocess.CompletedProcess[str]:
        """Runs a command to its end."""
        return subprocess.run(
            command, cwd=self.folder, env=environment(**self.settings), input=input, capture_output=True, text=True,
            timeout=RUN_SECONDS, check=False,
        )  # fmt: skip

    def flow(self, *arguments: str, app: str | None = "shop") -> subprocess.CompletedProcess[str]:
        """Runs ``celery -A APP flow …`` to its end."""
        named = () if app is None else ("-A", app)
        command = (*named, "flow", *arguments)
        return self.run(*CELERY, *command) if self.warm is None else self.warm.run(command, self.folder, self.settings)

    def done(self, *arguments: str, app: str = "shop") -> str:
        """What such a command prints; it must succeed."""
        ended = self.flow(*arguments, app=app)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def on_terminal(self, *command: str, columns: int = 80, typed: str = "") -> tuple[int, str]:
        """Exit code and output of a command at a terminal, on which something was typed ahead."""
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        process = subprocess.Popen(
            command, cwd=self.folder, env=environment(**self.settings, TERM="xterm"), stdin=slave, stdout=slave,
            stderr=slave, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        with os.fdopen(master, "rb", closefd=True) as screen:
            os.write(master, typed.encode())
            shown = b"".join(iter(partial(_read, screen.fileno()), b""))
        return process.wait(RUN_SECONDS), shown.decode()

    @contextmanager
    def started(self, *command: str, log: Path) -> Iterator[Background]:
        """Runs a command beside the test, in a session of its own; nothing of it is left afterwards."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment(**self.settings), stdin=subprocess.DEVNULL, stdout=output,
                stderr=output, start_new_session=True,
            )  # fmt: skip
        background = Background(process, self.folder, log)
        try:
            yield background
        finally:
            background.end()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # how a terminal says that nobody writes any more
        return b""


class Background:
    """A process that runs beside the test, and all that descends from it."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, log: Path) -> None:
        self.folder = folder
        self._process = process
        self._log = log
        self.pid = process.pid
        self.known = {process.pid: start_time(process.pid)}

    @property
    def output(self) -> str:
        """All that it has said so far."""
        return self._log.read_text(errors="replace")

    def wait_for(self, text: str, within_seconds: float = 60.0) -> None:
        """Waits until it has said this; if it ends before, that is a failure."""

        def said() -> bool:
            if text in self.output:
                return True
            assert self._process.poll() is None, f"ended with {self._process.returncode}:\n{self.output}"
            return False

        until(said, f"{text!r} is said", within_seconds=within_seconds)
        self.look()

    def look(self) -> dict[int, str | None]:
        """Its process and all that descend from it, as of now; remembered."""
        for pid in descendants(self.pid):
            self.known.setdefault(pid, start_time(pid))
        return self.known

    def left(self) -> list[str]:
        """What still runs of all that was ever seen of it."""
        running = [pid for pid, began in self.known.items() if is_running(pid, began)]
        return [f"{pid}: {command_of(pid)}" for pid in running]

    def send(self, signum: signal.Signals) -> None:
        self._process.send_signal(signum)

    def ended(self, within_seconds: float = 30.0) -> int:
        """Waits for it to end, and gives its exit code."""
        try:
            return self._process.wait(within_seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {within_seconds:g} s:\n{self.output}") from None

    def end(self) -> None:
        """Ends whatever is left of it."""
        self.look()
        for pid, began in self.known.items():
            if is_running(pid, began):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()


def descendants(pid: int) -> list[int]:
    """The processes that this one has started, and those that they have."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [each for child in children for each in (child, *descendants(child))]


def start_time(pid: int) -> str | None:
    """When a process began: a pid alone may be somebody else's by now. None: it does not run."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else fields[18]


def is_running(pid: int, began: str | None) -> bool:
    """Whether just this process still runs."""
    return began is not None and start_time(pid) == began


def command_of(pid: int) -> str:
    """A process's command line, for the report of a failure."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return "gone"
