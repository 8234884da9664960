"""The faults: each does what it says, or says that there was nothing to strike."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from celery_flows.store import FlowError, SqlFlowStore
from celery_flows.store.operations import reads
from celery_flows.store.tables import flow_dispatch
from tests.soak.brokers import SoakBroker
from tests.soak.monkey import Fault, Strike
from tests.soak.recovery import Row, Struck
from tests.soak.stage import BEATS, WORKERS, Stage, dies
from tests.soak.verdict import pid_of

# What a fault did: whether it hit anything, in words, and the processes whose work it was (None: not by process).
Done = tuple[bool, str, Sequence[int] | None]
OF_BROKER = frozenset({Fault.MESSAGES_LOST, Fault.BROKER_CUT, Fault.BROKER_RESTARTED})
OF_BEAT = frozenset({Fault.BEAT_KILLED, Fault.BEAT_STOPPED})


@dataclass
class Striker:
    """Carries out the monkey's choices."""

    stage: Stage
    broker: SoakBroker
    store: SqlFlowStore
    restart_database: Callable[[], tuple[int, int]] | None = None

    def possible(self) -> list[Fault]:
        """The faults that this broker and this database can have."""
        impossible = set()
        if self.store.engine.dialect.name != "postgresql":
            impossible.add(Fault.DATABASE_CUT)
        if self.restart_database is None:
            impossible.add(Fault.DATABASE_RESTARTED)
        if not self.broker.restartable:
            impossible.add(Fault.BROKER_RESTARTED)
        return [fault for fault in Fault if fault not in impossible]

    def strike(self, strike: Strike) -> Struck:
        """Strikes; what it hit are the rows that were in hand before and have not been claimed by others since."""
        before, at = self._rows(), time.time()
        hit, about, pids = self._do(strike)
        after = {(row.run_id, row.fence) for row in self._rows()}
        rows = [row for row in before if hit and (row.run_id, row.fence) in after and concerns(strike.fault, row, pids)]
        return Struck(at, strike.fault, hit, about, rows)

    def _rows(self) -> list[Row]:
        with suppress(FlowError):
            return self.store.run(rows_in_hand)
        return []

    def _do(self, strike: Strike) -> Done:
        worker, beat = WORKERS[strike.which % len(WORKERS)], BEATS[strike.which % len(BEATS)]
        match strike.fault:
            case Fault.CHILD_KILLED:
                return self._kill_child(worker, strike.roll)
            case Fault.PARENT_KILLED:
                children = self.stage.children(worker)
                return self.stage.kill_parent(worker), f"{worker}'s parent, not {children}", children
            case Fault.WORKER_KILLED:
                return _of_pids(worker, self.stage.kill(worker))
            case Fault.WORKER_TERMINATED | Fault.WORKER_QUIT:
                quits = strike.fault is Fault.WORKER_QUIT
                children = self.stage.children(worker)
                told = self.stage.tell(worker, signal.SIGQUIT if quits else signal.SIGTERM)
                return told, f"{worker} with {children}", children
            case Fault.CHILD_STOPPED:
                children = self.stage.children(worker)
                chosen = children[int(strike.roll * len(children)) :][:1]
                return _of_pids(worker, self.stage.stop(chosen, strike.stopped_seconds))
            case Fault.PARENT_STOPPED:
                children = self.stage.children(worker)
                stopped = self.stage.stop([self.stage.pid(worker)], strike.stopped_seconds)
                return bool(stopped), f"{worker}'s parent {stopped}", children
            case Fault.WORKER_STOPPED:
                pids = [self.stage.pid(worker), *self.stage.children(worker)]
                return _of_pids(worker, self.stage.stop(pids, strike.stopped_seconds))
            case Fault.BEAT_KILLED:
                return _of_pids(beat, self.stage.kill(beat))
            case Fault.BEAT_STOPPED:
                return _of_pids(beat, self.stage.stop([self.stage.pid(beat)], strike.stopped_seconds))
            case Fault.MESSAGES_LOST:
                lost = self.broker.lose()
                return lost > 0, f"{lost} messages", None
            case Fault.BROKER_CUT:
                cut = self.broker.cut()
                return cut > 0, f"{cut} connections", None
            case Fault.BROKER_RESTARTED:
                return self.broker.restart(), "server killed", None
            case Fault.DATABASE_CUT:
                cut = terminate_backends(self.store.engine.url)
                return cut > 0, f"{cut} backends", None
            case Fault.DATABASE_RESTARTED:
                assert self.restart_database is not None
                server, successor = self.restart_database()
                return server != successor, f"postmaster {server}, then {successor}", None

    def _kill_child(self, worker: str, roll: float) -> Done:
        children = self.stage.children(worker)
        if not children:
            return False, f"{worker} has no children", []
        child = children[int(roll * len(children))]
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        return dies(child), f"{worker}: {child}", [child]


def _of_pids(name: str, pids: Sequence[int]) -> Done:
    return bool(pids), f"{name}: {list(pids)}", pids


def concerns(fault: Fault, row: Row, pids: Sequence[int] | None) -> bool:
    """Whether this row's work was struck."""
    if fault in OF_BEAT:
        return False
    if fault in OF_BROKER:
        return row.worker is None
    return row.worker is not None and (pids is None or pid_of(row.worker) in pids)


@reads
def rows_in_hand(conn: sa.Connection) -> list[Row]:
    """The rows that a worker holds, or that were published and wait for one."""
    d = flow_dispatch.c
    in_hand = sa.or_(d.worker.isnot(None), d.publish_count > 0)
    found = sa.select(d.run_id, d.flow_id, d.fence, d.kind, d.worker).where(d.kind.in_(["drive", "step"]), in_hand)
    return [Row(row.run_id, str(row.flow_id), row.fence, row.kind, row.worker) for row in conn.execute(found)]


def terminate_backends(url: sa.URL) -> int:
    """Ends all connections of one PostgreSQL database, our own too; gives how many."""
    engine = sa.create_engine(url.set(database="postgres"), poolclass=NullPool)
    ended = sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name")
    with engine.connect() as connection:
        return sum(connection.execute(ended, {"name": url.database}).scalars())
