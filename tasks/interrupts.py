"""Interrupts: how a step's body is left while it runs, because its flow is cancelled or past its deadline.

A process that runs steps says, in memory that it shares with its worker's parent process, which claim's body it is in
the midst of; while it runs anything else it says nothing. The parent sends a signal to who says so, and to nobody else.
What the signal finds running by then decides itself: only in a body it raises, and whoever called that body asks the
store whether it was meant.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import struct
import threading
from collections.abc import Coroutine
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, TypeVar

from celery_flows.tasks.timeout import TimeIsUp, is_within

T = TypeVar("T")

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
        self._beside: _Beside | None = None  # the async ones that run in it
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

    async def coroutine(self, worker: str, body: Coroutine[Any, Any, T]) -> T:
        """:meth:`body`, for an async one: its task is cancelled, where it awaits. Of several beside each other all
        are."""
        if threading.current_thread() is not threading.main_thread():
            return await body
        if self._beside is None:
            self._beside = _Beside(self, worker.rpartition("/")[2])
        return await self._beside.run(body)

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
        if (body := self._body) is None or body.struck:
            return
        if isinstance(body, _Beside):
            body.struck = True
            body.cancel()
        elif not is_within(frame, __name__):  # there it has not begun, or has just ended
            body.struck = True
            raise Interrupted


class _Body:
    """A body while it runs. A class, not a generator: neither the signal nor a timeout's alarm may strike on its way in
    or out, and both know that way by this module."""

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


class _Beside(_Body):
    """Async bodies while they run. The signal may strike in the event loop's own code, so nothing is raised there."""

    def __init__(self, interrupts: Interrupts, claim: str) -> None:
        super().__init__(interrupts, claim)
        self._loop = asyncio.get_running_loop()
        self._running: set[asyncio.Task[Any]] = set()
        self._cancelled: set[asyncio.Task[Any]] = set()

    async def run(self, body: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        if not self._running:
            self._interrupts._begin(self)
        self._running.add(task)
        try:
            value = await body
        except (Exception, TimeIsUp, asyncio.CancelledError) as error:
            if self._was_only_ours(task):
                raise Interrupted from error  # what it made of the interrupt
            raise
        else:
            self._was_only_ours(task)
            return value
        finally:
            self._running.discard(task)
            if not self._running:
                self._interrupts._end(self)
                self._interrupts._beside = None

    def _was_only_ours(self, task: asyncio.Task[Any]) -> bool:
        """Whether the task was cancelled by the interrupt, and by nobody else; then it may go on."""
        if task not in self._cancelled:
            return False
        self._cancelled.discard(task)
        return task.uncancel() == 0

    def cancel(self) -> None:
        """Has their tasks cancelled, by the loop."""
        self._loop.call_soon_threadsafe(self._cancel_all)

    def _cancel_all(self) -> None:
        for task in self._running:
            self._cancelled.add(task)
            task.cancel()


class Interruptible:
    """How one claim's bodies are run: as :class:`Interrupts` has them."""

    def __init__(self, interrupts: Interrupts, worker: str) -> None:
        self._interrupts, self._worker = interrupts, worker

    def body(self) -> AbstractContextManager[None]:
        """While a body runs.

        Raises:
            Interrupted: it was interrupted, and did not come to a result all the same.
        """
        return self._interrupts.body(self._worker)

    def coroutine(self, body: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        """Awaits an async body; raises as :meth:`body`."""
        return self._interrupts.coroutine(self._worker, body)


class _InPeace(Interruptible):
    """Not at all."""

    def __init__(self) -> None: ...

    def body(self) -> AbstractContextManager[None]:
        return nullcontext()

    def coroutine(self, body: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        return body


IN_PEACE = _InPeace()


def _highest_pid() -> int:
    try:
        return int(Path("/proc/sys/kernel/pid_max").read_text())
    except OSError:
        return 99_999  # of macOS
