"""An answer that is kept for a while: whoever asks often costs no more than who asks now and then."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from celery_flows.store.clock import boottime

T = TypeVar("T")

LONGEST_WAIT_SECONDS = 5.0


class Kept(Generic[T]):
    """What ``ask`` gives, asked anew at most every ``seconds``, and for a fiftieth of the time at most, however long it
    takes. One asks at a time; meanwhile others get the last answer."""

    SHARE = 50

    def __init__(self, ask: Callable[[], T], seconds: float) -> None:
        self._ask, self._seconds = ask, seconds
        self._asking = threading.Lock()
        self._answer: T | None = None
        self._until = 0.0
        self.took_seconds = 0.0  # the last time

    def get(self) -> T | None:
        """The answer; None: the first is not there yet."""
        if boottime() < self._until:
            return self._answer
        if not self._asking.acquire(timeout=LONGEST_WAIT_SECONDS if self._answer is None else 0.0):
            return self._answer
        try:
            if boottime() >= self._until:
                began = boottime()
                self._answer = self._ask()
                self.took_seconds = boottime() - began
                self._until = boottime() + max(self._seconds, self.SHARE * self.took_seconds)
            return self._answer
        finally:
            self._asking.release()
