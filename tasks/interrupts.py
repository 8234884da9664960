"""Interrupts: how a step's body is left while it runs, because its flow is cancelled or past its deadline.

A process that runs steps says, in memory that it shares with its worker's parent process, which claim's body it is in
the midst of; while it runs anything else it says nothing. The parent sends a signal to who says so, and to nobody else.
What the signal finds running by then decides itself: only in a body it raises, and whoever called that body asks the
store whether it was meant.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

from celery_flows.tasks.timeout import TimeIsUp

# Ignored by every process that has not asked for it, and of no use to anybody else but a reader of urgent socket data.
SIGNAL = signal.SIGURG

_SLOT = struct.Struct("=4sI")
_MOST_BODIES = 1 << 32


class Interrupted(BaseException):
    """Unwinds a step's body whose flow is to end. Not an Exception, so that its own ``except Exception`` lets it
    pass."""


class Mark(NamedTuple):
    """One run of a step's body."""

    claim: str  # the last part of the claim's token
    number: int  # which body of its process, from 1


class Interrupts:
    """Which processes of a worker can be interrupted now. One per worker; in any other process nothing ever is."""

    def __init__(self) -> None:
        self._slots: mmap.mmap | None = None  # one for each process id
        self._body: _Body | None = None  # that runs in this process
        self._count = 0

    def share(self) -> None:
        """Makes the memory that the processes of this worker share; before its pool forks."""
        self._slots = mmap.mmap(-1, _SLOT.size * (_highest_pid() + 1))  # anonymous: what is not written takes no room

    def listen(self) -> None:
        """From now on bodies in the main thread of this process can be interrupted; not where the application has a
        use of its own for the signal."""
        if signal.getsignal(SIGNAL) in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(SIGNAL, self._strike)

    def body(self, worker: str) -> _Body:
        """While a body runs that may be interrupted; ``worker`` is its claim's token.

        Raises:
            Interrupted: it was, and did not come to a result all the same.
        """
        return _Body(self, worker.rpartition("/")[2])

    def running(self, pid: int) -> Mark | None:
        """The body that the process is in the midst of, if it can be interrupted."""
        if self._slots is None:
            return None
        claim, number = _SLOT.unpack_from(self._slots, pid * _SLOT.size)
        return Mark(claim.hex(), number) if number else None

    def _begin(self, body: _Body) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        if self._slots is None or not is_main or signal.getsignal(SIGNAL) != self._strike:
            return
        self._count = self._count % (_MOST_BODIES - 1) + 1
        self._body = body
        _SLOT.pack_into(self._slots, os.getpid() * _SLOT.size, bytes.fromhex(body.claim), self._count)

    def _end(self, body: _Body) -> None:
        if self._slots is not None and self._body is body:
            self._body = None
            _SLOT.pack_into(self._slots, os.getpid() * _SLOT.size, bytes(4), 0)

    def _strike(self, _signal: int, frame: FrameType | None) -> None:
        is_here = frame is not None and frame.f_code.co_filename == __file__  # it has not begun, or has just ended
        if (body := self._body) is not None and not body.struck and not is_here:
            body.struck = True
            raise Interrupted


class _Body:
    """A body while it runs. A class, not a generator: the signal must not strike on its way in or out."""

    def __init__(self, interrupts: Interrupts, claim: str) -> None:
        self._interrupts = interrupts
        self.claim = claim
        self.struck = False

    def __enter__(self) -> None:
        self._interrupts._begin(self)

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: TracebackType | None) -> None:
        self._interrupts._end(self)
        if self.struck and isinstance(error, Exception | TimeIsUp):
            raise Interrupted from error  # what it made of the interrupt


def _highest_pid() -> int:
    try:
        return int(Path("/proc/sys/kernel/pid_max").read_text())
    except OSError:
        return 99_999  # of macOS
