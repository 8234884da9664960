"""Waiting for something that is to be found in the store, by looking again and again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

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
    began = time.monotonic()
    pause = FIRST_POLL_SECONDS
    while (found := look()) is None:
        waited = time.monotonic() - began
        if timeout is not None and waited >= timeout:
            return None
        left = pause if timeout is None else min(pause, timeout - waited)
        time.sleep(left)
        longest = MAX_POLL_SECONDS if waited < PATIENT_AFTER_SECONDS else PATIENT_POLL_SECONDS
        pause = min(pause * POLL_FACTOR, longest)
    return found
