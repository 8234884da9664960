"""The event loop of a drive: in which the coroutines of its flow and steps run."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Collection, Coroutine
from typing import Any, TypeVar

from celery._state import _task_stack  # type: ignore[attr-defined]
from sqlalchemy.util.concurrency import await_only, greenlet_spawn, in_greenlet

from celery_flows.store.errors import InvalidData
from celery_flows.tasks.interrupts import Interruptible
from celery_flows.tasks.partials import innermost
from celery_flows.tasks.timeout import bounded, time_limit

T = TypeVar("T")


class Loop:
    """An event loop for one drive or one Celery step, made when the first coroutine comes. The engine stays
    synchronous: in an async flow it runs in greenlets, which wait for coroutines in this loop.

    It is not the thread's own one (``asyncio.set_event_loop``), and leaves signals alone.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[Any] | None = None
        self.is_ending = False  # tasks that are left over are being cancelled

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine to its end: in a greenlet of a loop that runs, there; else in this loop. Tasks that are left
        over then are cancelled.

        Raises:
            InvalidData: a loop of somebody else's runs in this thread.
        """
        if in_greenlet():
            return await_only(coroutine)
        if asyncio._get_running_loop() is not None:
            coroutine.close()
            raise InvalidData("event loop", "runs in this thread; call it in another, by await asyncio.to_thread(…)")
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        loop = self._loop
        self._main = main = loop.create_task(coroutine)
        try:
            return loop.run_until_complete(main)
        finally:
            if main.done() and not main.cancelled():
                main.exception()  # has been raised, perhaps past the task: it is not to be logged as never retrieved
            self._end_rest(loop)

    def end_main(self) -> None:
        """Cancels the coroutine that is run, if it is not the caller's own task."""
        if self._main is not None and asyncio.current_task() is not self._main:
            self._main.cancel()

    def close(self) -> None:
        """Ends the loop. Threads that its coroutines have left behind are not waited for: a call in one may never
        return, and would keep the worker's process with it, without a lease that anybody could see end."""
        if self._loop is None:
            return
        try:
            self._end_rest(self._loop)
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    def _end_rest(self, loop: asyncio.AbstractEventLoop) -> None:
        if rest := asyncio.all_tasks(loop):
            self.is_ending = True
            try:
                loop.run_until_complete(end(rest))
            finally:
                self.is_ending = False


async def spawn(call: Callable[[], T]) -> T:
    """Calls a function of the engine in a greenlet of its own, in which it may wait for coroutines. Celery keeps by
    greenlet which task is running, so it is told."""
    task = _task_stack.top
    if task is None:
        return await greenlet_spawn(call)
    request = task.request_stack.top

    def call_in_task() -> T:
        _task_stack.push(task)
        task.request_stack.push(request)
        try:
            return call()
        finally:
            task.request_stack.pop()
            _task_stack.pop()

    return await greenlet_spawn(call_in_task)


async def end(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancels tasks, and waits until all of them have ended, however they do."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()


def call(
    loop: Loop, work: Callable[..., Any], args: Any, kwargs: Any, seconds: float | None, interruptible: Interruptible
) -> Any:
    """Calls a step's function, within ``seconds``, None: as long as it takes. What is async runs in the loop.

    Raises:
        TimeIsUp: it took longer.
        Interrupted: its flow is to end, or so it seemed.
    """
    if is_async(work):
        value = work(*args, **kwargs)
    else:
        with time_limit(seconds), interruptible.body():
            value = work(*args, **kwargs)
        if not inspect.iscoroutine(value):
            return value
    return loop.run(bounded(interruptible.coroutine(value), seconds))


def is_async(work: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine: an ``async def``, a partial of one, or an object that is called as one."""
    work = innermost(work)
    return inspect.iscoroutinefunction(work) or inspect.iscoroutinefunction(type(work).__call__)


def is_cancelled() -> bool:
    """Whether somebody has cancelled the task that is running, so that its CancelledError is not its own affair. In a
    plain flow there is none, once what ran in the loop has ended."""
    loop = asyncio._get_running_loop()
    task = None if loop is None else asyncio.current_task(loop)
    return task is not None and task.cancelling() > 0


def pause(seconds: float) -> None:
    """Lets seconds pass, in which the other tasks of the loop go on, if there is one."""
    if in_greenlet():
        await_only(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)
