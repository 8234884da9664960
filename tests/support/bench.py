"""An application's flows in this process, and the hands of a worker to drive them with, row by row.

No worker process and no message is needed: a message is a hint, so whoever claims what the store says is due does
what a worker does. The broker is kombu's own in memory; tests look at the messages, nothing consumes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID

import sqlalchemy as sa
from celery import Celery, Task

from celery_flows import FlowHandle, Flows, SqlFlowStore
from celery_flows.store import operations as op
from celery_flows.store.engines import make_engine
from celery_flows.store.tables import flow_dispatch, flow_limits, flows
from celery_flows.tasks.testing.hands import Hands
from tests.support.fold import assert_whole
from tests.support.waiting import until

T = TypeVar("T")
_numbers = itertools.count(1)
_d = flow_dispatch.c

PAST = datetime(2020, 1, 1, tzinfo=UTC)
ROUNDS = 200  # a flow that is still not at rest by then spins


@dataclass(frozen=True)
class Message:
    """A message as the broker has it."""

    task: str
    id: str
    shadow: str | None
    kwargs: dict[str, Any]
    args: list[Any]
    queue: str


class Bench(Hands):
    """Flows over a database, with everything a worker would do to be done by hand."""

    name = "bench"

    def __init__(
        self, url: str, *, store: SqlFlowStore | None = None, broker: str = "memory://", app: Celery | None = None,
        **conf: Any,
    ) -> None:  # fmt: skip
        self.url = url
        self.queue = f"bench-{next(_numbers)}"
        self.app = app or Celery(self.queue, broker=broker, set_as_current=False)
        self.app.conf.update(broker_url=broker, task_default_queue=self.queue, broker_connection_retry=False)
        self.app.conf.update({f"flow_{name}": value for name, value in conf.items()})
        self.store = store or SqlFlowStore(make_engine(url))
        self.flows = Flows(self.app, store=self.store) if app is None else self._served(app)
        super().__init__(self.flows.runtime)
        self.effects: list[Any] = []

    def _served(self, app: Celery) -> Flows:
        """The flows of an application of somebody's own, over this bench's database."""
        flows = Flows.of(app)
        flows.runtime._store = self.store
        return flows

    def close(self) -> None:
        """Closes the connections to the database."""
        self.store.close()

    def task(self, name: str, **options: Any) -> Callable[[Callable[..., T]], Task[Any, T]]:
        """``@app.task`` for this app alone: by default Celery gives a task to every app of the process."""
        decorator: Callable[[Callable[..., T]], Task[Any, T]] = self.app.task(name=name, shared=False, **options)
        return decorator

    # ---- what a worker does, of all there is to do ----

    def claimable(self) -> list[tuple[str, str]]:
        """Kind and run id of what a message would find to claim, steps first."""
        published = sa.and_(_d.worker.is_(None), _d.publish_count > 0)
        with self.store.engine.connect() as connection:
            due = sa.or_(published, _d.due_at <= op.now(connection))
            wanted = sa.select(_d.kind, _d.run_id).where(_d.task.isnot(None), due)
            rows = connection.execute(wanted.order_by(_d.kind.desc(), _d.run_id)).all()
        return [(row.kind, row.run_id) for row in rows]

    def work(self) -> None:
        """Does what is claimable until nothing is: as if every message came through at once."""
        for _ in range(ROUNDS):
            todo = self.claimable()
            if not todo:
                return
            for kind, run_id in todo:
                self.drive(UUID(run_id)) if kind == "drive" else self.run_step(run_id)
        raise AssertionError(f"not at rest after {ROUNDS} rounds: {todo}")

    def finish(self, handle: FlowHandle[T], seconds: float = 10.0) -> T:
        """Works until the flow has ended, timers included, and gives its result."""

        def ended() -> bool:
            self.work()
            return handle.status().is_terminal

        until(ended, "the flow ends", within_seconds=seconds)
        return handle.result(0)

    def recover(self) -> None:
        """What follows a crash: the leases end, a sweep finds that, the work is done."""
        self.end_leases()
        self.sweep()
        self.work()

    # ---- time, which the tests move ----

    def call_driver(self, flow_id: UUID) -> None:
        """The flow's row is due, as when somebody calls its driver."""
        self._past(_d.run_id == str(flow_id))

    def end_leases(self) -> int:
        """All leases have ended: their workers were silent for too long."""
        return self._past(_d.worker.isnot(None))

    def pass_time(self) -> int:
        """Every time that rows wait for has come: timers, retries, the next publishing, the end of leases."""
        with self.store.engine.begin() as connection:
            connection.execute(sa.update(flow_limits).values(due_at=PAST))
        return self._past(_d.due_at.isnot(None))

    def _past(self, rows: sa.ColumnElement[bool]) -> int:
        with self.store.engine.begin() as connection:
            return connection.execute(sa.update(flow_dispatch).where(rows).values(due_at=PAST)).rowcount

    # ---- what is there ----

    def query(self, statement: Any) -> list[Any]:
        """The rows of a query."""
        with self.store.engine.connect() as connection:
            return list(connection.execute(statement))

    def rows(self, flow_id: UUID) -> list[Any]:
        """The dispatch rows of a flow, its drive row first."""
        return self.query(sa.select(flow_dispatch).where(_d.flow_id == flow_id).order_by(_d.kind, _d.run_id))

    def kinds(self, flow_id: UUID) -> list[str]:
        """The kinds of a flow's events, oldest first."""
        return [event.kind for event in self.store.list_events(flow_id, None)[::-1]]

    def messages(self, queue: str | None = None) -> list[Message]:
        """Takes the messages off a queue; None: the default one."""
        name = queue or self.queue
        taken = []
        with self.app.connection_for_read() as connection, connection.channel() as channel:
            bound = self.app.amqp.queues[name](channel)
            bound.declare()
            while (message := bound.get(no_ack=True)) is not None:
                args, kwargs, _ = message.decode()
                headers = message.headers
                taken.append(Message(headers["task"], headers["id"], headers.get("shadow"), kwargs, args, name))
        return taken

    # ---- the audit ----

    def audit(self) -> None:
        """What must hold after anything: no gap in any history, events give the rows back, ended flows own no row."""
        for flow_id in [row.id for row in self.query(sa.select(flows.c.id))]:
            assert_whole(self.store, flow_id)
            flow = self.store.get(flow_id)
            assert flow is not None
            if flow.status.is_terminal:
                assert self.rows(flow_id) == []
                assert flow.finished_at is not None
                assert all(step.status.is_terminal for step in self.store.list_steps(flow_id))
        for row in self.query(sa.select(flow_dispatch)):
            assert row.open_members >= 0
