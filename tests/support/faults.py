"""Faults to strike with: a store whose process dies at a chosen call, servers that are not there or never answer."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import sqlalchemy as sa

from celery_flows.store.script import Call, Pause
from celery_flows.tasks.testing.crash import Died as Died
from celery_flows.tasks.testing.crash import DyingStore


class Strikes(Enum):
    """Where a fault strikes a call of the store."""

    BEFORE = "before"  # the process dies, the call was never made
    AFTER = "after"  # the call has committed, the process dies with the answer
    REPLY_LOST = "reply lost"  # the call has committed, the connection breaks before the answer


class MortalStore(DyingStore):
    """A store to which the fault happens at its ``at``-th call from now on; a dead process makes no further call."""

    def __init__(self, engine: sa.Engine) -> None:
        self.calls = 0
        self.struck: str | None = None  # the operation that the fault struck
        self._at: int | None = None
        self._strikes = Strikes.BEFORE
        super().__init__(engine)

    def strike(self, at: int, strikes: Strikes) -> None:
        """Arms the fault."""
        self.calls, self._at, self._strikes = 0, at, strikes

    def _perform(self, step: Call | Pause) -> Any:
        if self.dead or isinstance(step, Pause):
            return super()._perform(step)
        self.calls += 1
        if self.calls != self._at:
            return super()._perform(step)
        self.struck = step.operation.__name__
        if self._strikes is not Strikes.BEFORE:
            answer = super()._perform(step)
            del answer
        if self._strikes is Strikes.REPLY_LOST:
            raise sa.exc.OperationalError("COMMIT", {}, OSError("no answer"), connection_invalidated=True)
        return self.die()


def closed_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


@contextmanager
def black_hole() -> Iterator[int]:
    """The port of a server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)  # the kernel accepts; nobody ever reads
        yield server.getsockname()[1]
