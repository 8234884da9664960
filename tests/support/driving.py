"""What a driver and its workers ask of the store, without Celery: start, claim, schedule, complete, sweep."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from celery_flows.store import Flow, FlowStepStatus, SqlFlowStore, TimerWait, dispatch, inbox
from celery_flows.store import operations as op
from celery_flows.store.changes import Change, Completion, Drive, End, Holder, Join, Member, Park, StepWrite
from celery_flows.store.dispatch import Completed, DriveClaim, StepClaim, Swept
from celery_flows.store.tables import flow_dispatch
from celery_flows.store.waits import wait_json
from tests.support.samples import a_flow

LEASE = 30.0


class Driving:
    """Drives flows by hand; workers are but names."""

    def __init__(self, store: SqlFlowStore) -> None:
        self.store = store

    def start(self, **fields: Any) -> Flow:
        """A new flow with its drive row, as published."""
        flow = a_flow(**fields)
        assert self.store.run(op.create_flow, flow, {}, Drive("orders/fulfil", "default", 5, 10.0))
        return flow

    def claim(self, flow_id: UUID, worker: str = "w1", *, repeat: bool = False) -> DriveClaim | None:
        return self.store.run(dispatch.claim_drive, flow_id, worker, LEASE, repeat=repeat)

    def claimed(self, flow_id: UUID, worker: str = "w1") -> DriveClaim:
        """The claim, which must succeed."""
        claim = self.claim(flow_id, worker)
        assert claim is not None
        return claim

    def write(self, claim: DriveClaim, kind: str, columns: Mapping[str, Any], **more: Any) -> Flow:
        """One revision on top of the claim's."""
        return self.store.change(Change(claim.flow.id, claim.flow.revision, kind, columns, **more)).flow

    def record(self, claim: DriveClaim, name: str = "reserve") -> Flow:
        """The outcome of a step that ran inline."""
        step = StepWrite(f"{claim.flow.id}/{name}", name, FlowStepStatus.SUCCEEDED, 1, result="1", elapsed_us=1500)
        return self.write(claim, "step_succeeded", {"current_step": name}, step=step, forgive=True)

    def schedule(self, claim: DriveClaim, count: int, *, good: int | None = None, bad: int = 0) -> list[str]:
        """A gather: members scheduled, the drive row parked until the join is met. Gives the run ids."""
        group = claim.join_group + 1
        members = tuple(
            Member(
                f"{claim.flow.id}/{group}/{n}", "charge", n, '{"args":[],"kwargs":{}}', "default", 5, {"time_limit": 9}
            )
            for n in range(count)
        )
        join = Join(group, count if good is None else good, bad)
        drive = Park(claim.holder, claim.wakes, None, join)
        self.write(claim, "step_scheduled", {"current_step": "charge"}, members=members, first_pause=10.0, drive=drive)
        return [member.run_id for member in members]

    def gathering(self, count: int, *, good: int | None = None, bad: int = 0) -> tuple[Flow, list[str]]:
        """A new flow that waits for a gather, and its members' run ids."""
        flow = self.start()
        run_ids = self.schedule(self.claimed(flow.id), count, good=good, bad=bad)
        return flow, run_ids

    def claim_step(self, run_id: str, worker: str = "s1") -> StepClaim | None:
        return self.store.run(dispatch.claim_step, run_id, worker, LEASE)

    def complete(self, holder: Holder, flow_id: UUID, *, failed: bool = False) -> Completed | None:
        if failed:
            outcome = Completion(holder, flow_id, FlowStepStatus.FAILED, error={"type": "E", "message": ""})
        else:
            outcome = Completion(holder, flow_id, FlowStepStatus.SUCCEEDED, result='{"n":1}')
        return self.store.run(dispatch.complete_step, outcome)

    def work(self, run_id: str, *, failed: bool = False) -> Completed:
        """Claims a member and completes it."""
        claim = self.claim_step(run_id)
        assert claim is not None
        completed = self.complete(claim.holder, claim.flow_id, failed=failed)
        assert completed is not None
        return completed

    def park(self, claim: DriveClaim, **more: Any) -> bool:
        return self.store.run(dispatch.park, Park(claim.holder, claim.wakes, **more))

    def wait(self, claim: DriveClaim, timer: TimerWait) -> Flow:
        columns = {"status": "waiting", "wait_json": wait_json(timer)}
        return self.write(claim, "waiting", columns, drive=Park(claim.holder, claim.wakes, timer.at))

    def end(self, claim: DriveClaim) -> Flow:
        return self.write(claim, "finished", {"status": "finished", "result_json": None}, drive=End())

    def sweep(self, limit: int = 100, first: float = 10.0, cap: float = 300.0) -> list[Swept]:
        return self.store.run(dispatch.sweep_due, limit, first, cap)

    def emit(self, topic: str, correlation_id: str, payload: Any, event_id: UUID) -> bool:
        return self.store.run(inbox.emit, topic, correlation_id, payload, event_id, 10.0)

    # ---- looking, and moving time ----

    def row(self, run_id: object) -> Mapping[Any, Any]:
        """The dispatch row, which must be there."""
        (row,) = self.rows(flow_dispatch.c.run_id == str(run_id))
        return row

    def rows(self, where: sa.ColumnElement[bool] | None = None) -> list[Mapping[Any, Any]]:
        """Dispatch rows, all of them if not told which."""
        query = sa.select(flow_dispatch).order_by(flow_dispatch.c.run_id)
        with self.store.engine.connect() as connection:
            return list(connection.execute(query if where is None else query.where(where)).mappings())

    def pass_time(self, seconds: float) -> None:
        """Lets so much time pass, as far as due rows can tell."""
        due = [(row["run_id"], row["due_at"]) for row in self.rows(flow_dispatch.c.due_at.is_not(None))]
        with self.store.engine.begin() as connection:
            for run_id, at in due:
                mine = sa.update(flow_dispatch).where(flow_dispatch.c.run_id == run_id)
                connection.execute(mine.values(due_at=at - timedelta(seconds=seconds)))

    def now(self) -> Any:
        """The database's clock."""
        return self.store.run(op.now)
