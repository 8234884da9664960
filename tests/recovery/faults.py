"""The faults: each makes itself happen, proves that it did, and gives the seconds until the struck work went on.

Unless a fault says otherwise, they count from the fault to the moment at which the struck step's body began again.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from celery_flows.store import dispatch
from celery_flows.store.clock import boottime
from celery_flows.tasks.drive import drive
from tests.recovery.proof import promise, proof
from tests.recovery.servers import DATABASES, Breakable
from tests.recovery.stage import Stage
from tests.support.shop import CONF
from tests.support.waiting import until
from tests.support.workers import Worker, is_alive

SOFT_SECONDS = 3


@dataclass(frozen=True)
class Fault:
    """One kind of fault."""

    name: str
    strike: Callable[[Stage], float | None]
    what: str  # strikes, and which time is given
    target_seconds: float | None = None  # the recovery time that is promised, with default settings
    databases: tuple[str, ...] = DATABASES
    breaks_broker: bool = False


def child_killed(stage: Stage) -> float:
    stage.worker()
    pid = stage.hold("work")
    at = boottime()
    stage.kill(pid)
    stage.open_gate()
    return stage.began_again("work") - at


def worker_killed(stage: Stage) -> float:
    worker, pid = _held_and_another(stage)
    at = boottime()
    died = worker.kill()
    with proof("the whole worker died"):
        assert pid in died
        assert not any(map(is_alive, died))
    stage.open_gate()
    return stage.began_again("work") - at


def worker_stopped(stage: Stage) -> float:
    worker, pid = _held_and_another(stage)
    at = boottime()
    with proof("the whole worker stood still"):
        assert pid in worker.freeze_between_writes(stage.shop.flows.store.engine.url)
    seconds = stage.began_again("work") - at
    worker.thaw()
    stage.open_gate()
    with promise("the thawed worker's late outcome is refused"):
        until(lambda: "its outcome is refused" in worker.output, "it says so", within_seconds=30)
    return seconds


def messages_lost(stage: Stage) -> float:
    stage.worker("-c", "1")
    _queue_behind_held_step(stage)
    at = boottime()
    stage.broker.lose_everything(stage.queue)
    stage.await_waiting(0)
    stage.open_gate()
    return stage.began("lost 1", "lost 2") - at


def broker_restarted(stage: Stage) -> float:
    stage.worker("-c", "1")
    _queue_behind_held_step(stage)
    back_at = cast(Breakable, stage.broker).restart_empty(stage.queue)
    stage.open_gate()
    return stage.began("lost 1", "lost 2") - back_at


def connections_terminated(stage: Stage) -> float:
    stage.worker()
    stage.hold("work")
    stage.shop.flows.store.engine.dispose()  # ours are not to be struck
    at = _terminate_backends(stage)
    stage.open_gate()
    return stage.moment("after") - at


def warm_shutdown(stage: Stage) -> float:
    other_queue = f"{stage.queue}-other"
    following = stage.worker("-Q", other_queue)
    leaving = stage.worker("-c", "1")
    pid = stage.hold("held")
    stage.start("taken")  # its message waits in the worker that leaves
    stage.await_waiting(0)
    stage.start("queued")
    stage.await_waiting(1)
    with proof("the work waited when the worker was told to stop"):
        assert not stage.shop.effects.read("taken began")
        assert is_alive(pid)
    at = boottime()
    leaving.terminate()
    stage.shop.app.control.add_consumer(stage.queue, destination=[f"{following.name}@{os.uname().nodename}"])
    went_on = stage.began("taken", "queued") - at
    stage.open_gate()
    between_steps = stage.moment("after") - stage.moment("held ended")
    _left_in_peace(leaving)
    return max(went_on, between_steps)


def cold_shutdown(stage: Stage) -> float:
    leaving, pid = _held_and_another(stage)
    at = boottime()
    leaving.process.send_signal(signal.SIGQUIT)
    stage.await_death(pid)
    stage.open_gate()
    again_at = stage.began_again("work")
    _left_in_peace(leaving)
    return again_at - at


def soft_shutdown(stage: Stage) -> float:
    settings = json.dumps({"worker_soft_shutdown_timeout": SOFT_SECONDS})
    leaving, pid = _held_and_another(stage, REMAP_SIGTERM="SIGQUIT", **{CONF: settings})
    at = boottime()
    leaving.terminate()
    stage.await_death(pid)
    with proof("the step had its time to end"):
        assert boottime() - at >= SOFT_SECONDS
    stage.open_gate()
    again_at = stage.began_again("work")
    _left_in_peace(leaving)
    return again_at - at


def message_doubled(stage: Stage) -> None:
    stage.open_gate()
    stage.start("work")
    stage.await_waiting(1)
    flow_id, runtime = stage.flows["work"].id, stage.shop.flows.runtime
    drive(runtime, flow_id, "driver of this round")
    step = next(row for row in runtime.store.run(dispatch.read_history, flow_id) if not row.status.is_terminal)
    hints = [
        dispatch.Hint(step.run_id, flow_id, "step", step.task, stage.queue),
        dispatch.Hint(str(flow_id), flow_id, "drive", "shop/held step", stage.queue),
    ]
    with proof("every message was there several times"):
        assert runtime.publisher.publish(*hints, *hints) == 4
    stage.await_waiting(6)
    workers = [stage.worker(), stage.worker()]
    stage.moment("after")
    stage.await_waiting(0)
    for worker in workers:  # what they took, they have done when they have left
        worker.terminate()
    for worker in workers:
        _left_in_peace(worker)


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("child-killed", child_killed, "kill -9 of the child that runs the step", target_seconds=15),
        Fault("worker-killed", worker_killed, "kill -9 of parent and children; another is there", target_seconds=45),
        Fault("worker-stopped", worker_stopped, "SIGSTOP of parent and children; SIGCONT after another took over"),
        Fault("messages-lost", messages_lost, "the queue is emptied; until the last flow in it began its step"),
        Fault(
            "broker-restarted", broker_restarted, "the broker is killed and comes back empty (RabbitMQ: its queue is "
            "emptied, all connections are closed); from its being back to the last flow's step", breaks_broker=True,
        ),
        Fault(
            "connections-terminated", connections_terminated, "pg_terminate_backend of all of a worker's backends; "
            "until the step after the one in hand", databases=("postgresql",),
        ),
        Fault(
            "warm-shutdown", warm_shutdown, "SIGTERM with a step in hand and work queued; until the queued work is "
            "begun by another worker, or from the end of the step in hand to the next one, whichever is longer",
        ),
        Fault("cold-shutdown", cold_shutdown, "SIGQUIT with a long step in hand; another worker is there"),
        Fault(
            "soft-shutdown", soft_shutdown, f"SIGTERM under REMAP_SIGTERM=SIGQUIT with a long step in hand; the "
            f"{SOFT_SECONDS} s that it has to end are part of the time",
        ),
        Fault("message-doubled", message_doubled, "every message several times, two workers; there is no time to give"),
    )
}  # fmt: skip


def _held_and_another(stage: Stage, **environment: str) -> tuple[Worker, int]:
    """A worker with a step in hand, the process that runs it, and one more worker that is free."""
    worker = stage.worker(**environment)
    pid = stage.hold("work")
    with proof("the worker had the step in hand"):
        assert pid in worker.children()
    stage.worker()
    return worker, pid


def _queue_behind_held_step(stage: Stage) -> None:
    """One flow is in the only worker's one hand, the next one's message in its parent, two wait in the broker."""
    stage.hold("held")
    stage.start("taken")
    stage.await_waiting(0)
    stage.start("lost 1", "lost 2")
    stage.await_waiting(2)


def _left_in_peace(worker: Worker) -> None:
    with promise("the worker that was told to stop ends by itself"):
        code = worker.wait_exit()
        assert code == 0, f"exit code {code}"


def _terminate_backends(stage: Stage) -> float:
    """Ends all sessions of the round's database; gives the moment of that."""
    others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    engine = sa.create_engine(stage.shop.flows.store.engine.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with proof("the worker's database connections were ended"), engine.connect() as connection:
        before = set(connection.scalars(sa.text(f"SELECT pid {others}")))
        assert before, "the worker had connections"
        at = boottime()
        connection.execute(sa.text(f"SELECT pg_terminate_backend(pid) {others}"))
        until(lambda: not before & set(connection.scalars(sa.text(f"SELECT pid {others}"))), "they are gone")
    return at
