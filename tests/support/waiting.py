"""Waiting for facts: always with a deadline, never for a while and then hoping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.02


def wait_until(fact: Callable[[], T], seconds: float = 20.0, *, what: str = "") -> T:
    """The first answer of ``fact`` that is true. Past the deadline the test fails, with the last answer."""
    deadline = time.monotonic() + seconds
    while not (answer := fact()):
        if time.monotonic() > deadline:
            name = what or getattr(fact, "__qualname__", repr(fact))
            raise AssertionError(f"not within {seconds:g} s: {name} (the last answer was {answer!r})")
        time.sleep(POLL_SECONDS)
    return answer
