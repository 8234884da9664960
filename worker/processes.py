"""The processes of a worker: which requests of ours they run, and whether they live."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from celery_flows.tasks.publish import DRIVE_TASK, STEP_TASK
from celery_flows.tasks.runtime import worker_token

STILL_SECONDS = 0.5  # for a process to stand still that was told to


def held_by(requests: Iterable[Any]) -> dict[str, int]:
    """The tokens of our running requests, with the process that runs each; the set changes while we look.

    By the request's type: its name is what Flower shows, the flow's or step's.
    """
    while True:
        try:
            running = [request for request in list(requests) if request.type in (DRIVE_TASK, STEP_TASK)]
            break
        except RuntimeError:
            continue
    held = [request for request in running if request.worker_pid is not None]
    return {worker_token(request.worker_pid, request.id): request.worker_pid for request in held}


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that died and was not waited for yet does not."""
    if pid == os.getpid():
        return True
    try:
        state = _state_of(pid)
    except FileNotFoundError:
        return not Path("/proc/self/stat").exists() and _answers(pid)
    return state not in ("Z", "X")


@contextmanager
def standing_still(pid: int) -> Iterator[bool]:
    """Stops another process for as long as this is inside; gives whether it surely stands still: what it has said then
    stays true."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    try:
        yield _stands_still(pid)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _stands_still(pid: int) -> bool:
    deadline = time.monotonic() + STILL_SECONDS
    with suppress(FileNotFoundError):
        while (state := _state_of(pid)) != "T" and time.monotonic() < deadline:
            time.sleep(0.001)
        return state == "T"
    return False


def _state_of(pid: int) -> str:
    """As the kernel has it.

    Raises:
        FileNotFoundError: there is no such process, or this system does not tell.
    """
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
