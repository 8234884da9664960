"""A bound on how long a step may take: an interrupt where the process allows one, a verdict afterwards where not."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from celery_flows.store.clock import boottime

T = TypeVar("T")

# Its code marks where a body begins and ends. Struck there, a process would keep the mark of a body that it has left,
# and what it runs next, cleanup maybe, would be interrupted as that body.
_SPARED = "celery_flows.tasks.interrupts"
_LATER_SECONDS = 0.001


class TimeIsUp(BaseException):
    """Unwinds a step that takes too long. Not an Exception, so that its own ``except Exception`` lets it pass."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Bounds what runs inside.

    In a process's main thread (the prefork and solo pools) it is interrupted, by SIGALRM; native code that does not
    return to Python is interrupted when it does. Elsewhere (the threads pool) nothing can be interrupted, and neither
    can what swallows the interrupt: it is judged when it ends.

    Raises:
        TimeIsUp: it took longer.
    """
    if seconds is None:
        yield
        return
    began = boottime()
    if threading.current_thread() is threading.main_thread():
        with _alarm(seconds):
            yield
    else:
        yield
    if boottime() - began > seconds:
        raise TimeIsUp


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    armed = True

    def interrupt(_signal: int, frame: FrameType | None) -> None:
        if not armed:
            return
        if is_within(frame, _SPARED):
            signal.setitimer(signal.ITIMER_REAL, _LATER_SECONDS)
        else:
            raise TimeIsUp

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
            yield
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # the interrupt may strike in between
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def is_within(frame: FrameType | None, module: str) -> bool:
    """Whether the frame is of the module's code, or of what that has called."""
    while frame is not None:
        if frame.f_globals.get("__name__") == module:
            return True
        frame = frame.f_back
    return False


async def bounded(coroutine: Coroutine[Any, Any, T], seconds: float | None) -> T:
    """Bounds a coroutine: it is cancelled where it awaits. One that does not, or that swallows that, is judged when it
    ends. No alarm, which could strike in the event loop's own code.

    Raises:
        TimeIsUp: it took longer.
    """
    if seconds is None:
        return await coroutine
    began = boottime()
    try:
        async with asyncio.timeout(seconds) as limit:
            value = await coroutine
    except TimeoutError:
        if limit.expired():
            raise TimeIsUp from None
        raise
    if boottime() - began > seconds:
        raise TimeIsUp
    return value
