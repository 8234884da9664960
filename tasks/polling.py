"""Waiting for something that is to be found in the store, by looking again and again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from celery_flows.store.errors import InvalidData

T = TypeVar("T")

# A poll overshoots by at most half of what has been waited so far, and costs one look-up by primary key.
FIRST_POLL_SECONDS, POLL_FACTOR, MAX_POLL_SECONDS, PATIENT_POLL_SECONDS, PATIENT_AFTER_SECONDS = (
    0.002,
    1.5,
    0.25,
    1.0,
    30,
)


def poll(look: Callable[[], T | None], timeout: float | None) -> T | None:
    """What ``look`` finds; None: nothing within ``timeout`` seconds. A timeout of None is no limit."""
    pauses = _pauses(timeout)
    while (found := look()) is None:
        pause = next(pauses, None)
        if pause is None:
            return None
        time.sleep(pause)
    return found


async def apoll(look: Callable[[], Awaitable[T | None]], timeout: float | None) -> T | None:
    """:func:`poll`, awaited. No thread waits along."""
    pauses = _pauses(timeout)
    while (found := await look()) is None:
        pause = next(pauses, None)
        if pause is None:
            return None
        await asyncio.sleep(pause)
    return found


def check_seconds(field: str, value: Any) -> None:
    """Says nothing if it is a number of seconds, or None.

    Raises:
        InvalidData: it is neither.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise InvalidData(field, f"must be a number of seconds, not {type(value).__name__}")


def _pauses(timeout: float | None) -> Iterator[float]:
    """The seconds between two looks, until the time is over."""
    began = time.monotonic()
    pause = FIRST_POLL_SECONDS
    while True:
        waited = time.monotonic() - began
        if timeout is not None and waited >= timeout:
            return
        yield pause if timeout is None else min(pause, timeout - waited)
        longest = MAX_POLL_SECONDS if waited < PATIENT_AFTER_SECONDS else PATIENT_POLL_SECONDS
        pause = min(pause * POLL_FACTOR, longest)
