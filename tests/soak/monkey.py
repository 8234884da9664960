"""The monkey: which fault strikes, whom and when. A pure function of the seed and of what can be struck at all."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from tests.soak.application import LEASE_SECONDS


class Fault(StrEnum):
    """What the monkey can do."""

    CHILD_KILLED = "child killed"
    PARENT_KILLED = "worker's parent killed"
    WORKER_KILLED = "worker killed"
    WORKER_TERMINATED = "worker told to stop (SIGTERM)"
    WORKER_QUIT = "worker told to stop (SIGQUIT)"
    CHILD_STOPPED = "child stopped for a time"
    PARENT_STOPPED = "worker's parent stopped for a time"
    WORKER_STOPPED = "worker stopped for a time"
    BEAT_KILLED = "beat killed"
    BEAT_STOPPED = "beat stopped for a time"
    MESSAGES_LOST = "messages lost"
    BROKER_CUT = "broker connections closed"
    BROKER_RESTARTED = "broker killed, restarted empty"
    DATABASE_CUT = "database connections terminated"
    DATABASE_RESTARTED = "database restarted"


WEIGHTS = {
    Fault.CHILD_KILLED: 4,
    Fault.PARENT_KILLED: 1,
    Fault.WORKER_KILLED: 2,
    Fault.WORKER_TERMINATED: 2,
    Fault.WORKER_QUIT: 2,
    Fault.CHILD_STOPPED: 3,
    Fault.PARENT_STOPPED: 2,
    Fault.WORKER_STOPPED: 2,
    Fault.BEAT_KILLED: 1,
    Fault.BEAT_STOPPED: 1,
    Fault.MESSAGES_LOST: 3,
    Fault.BROKER_CUT: 2,
    Fault.BROKER_RESTARTED: 1,
    Fault.DATABASE_CUT: 3,
    Fault.DATABASE_RESTARTED: 1,
}
PAUSE_SECONDS = (1.0, 6.0)  # between two strikes: workers take some to start, and something is to be struck
STOPPED_SECONDS = (1.2 * LEASE_SECONDS, 2.0 * LEASE_SECONDS)  # others take over meanwhile


@dataclass(frozen=True, slots=True)
class Strike:
    """One choice of the monkey."""

    pause_seconds: float  # since the strike before
    fault: Fault
    which: int  # worker, or beat
    roll: float  # which of its children, from 0 up to 1
    stopped_seconds: float  # if the fault is for a time


def strikes(seed: int, possible: Sequence[Fault], workers: int) -> Iterator[Strike]:
    """The strikes of a seed, without end. Each takes as many draws as any, so none depends on what came of another."""
    rng = random.Random(f"monkey {seed}")
    ordered = [fault for fault in Fault if fault in possible]
    weights = [WEIGHTS[fault] for fault in ordered]
    while True:
        yield Strike(
            pause_seconds=rng.uniform(*PAUSE_SECONDS),
            fault=rng.choices(ordered, weights)[0],
            which=rng.randrange(workers),
            roll=rng.random(),
            stopped_seconds=rng.uniform(*STOPPED_SECONDS),
        )
