"""What stands in for a rule that is taken away: each takes the function that is there, and gives the mutated one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Connection

from celery_flows.store import LeaseLost, dispatch, sqlite
from celery_flows.store import operations as op
from celery_flows.store.changes import Change, Completion, Park, Wake
from celery_flows.store.dispatch import Held
from celery_flows.store.models import FlowStep, new_id
from celery_flows.store.tables import flow_dispatch, flow_inbox, flow_steps, flows
from celery_flows.tasks.driver import Driver
from celery_flows.tasks.errors import StepFailed

_d, _s, _i = flow_dispatch.c, flow_steps.c, flow_inbox.c
Plant = Callable[[Any], Any]


def nothing(original: Any) -> Any:
    """Does not do it."""
    return lambda *args, **kwargs: None


def yes(original: Any) -> Any:
    """Says so, whatever it is."""
    return lambda *args, **kwargs: True


def no_starts(original: Any) -> Any:
    """Forgets when flows began."""
    return lambda *args: []


def none_found(original: Any) -> Any:
    """Looks, and says that there is nothing."""
    return like(original, lambda conn, *args: None)


def like(original: Any, mutated: Any) -> Any:
    """``mutated``, to be run as the store runs the original."""
    if hasattr(original, "mode"):
        mutated.mode = original.mode
    mutated.__name__ = original.__name__
    return mutated


def began_anew(original: Any) -> Any:
    """Claims a flow that nobody claimed before as if it had no history."""

    def mutated(conn: Connection, *args: Any, **kwargs: Any) -> Any:
        claim = original(conn, *args, **kwargs)
        return claim and replace(claim, began=claim.began or claim.holder.fence == 1)

    return like(original, mutated)


def then(*statements: Callable[..., Any]) -> Plant:
    """The original, and then some more statements on its connection and arguments."""

    def plant(original: Any) -> Any:
        def mutated(conn: Connection, *args: Any, **kwargs: Any) -> Any:
            before = {row["run_id"]: row for row in conn.execute(sa.select(flow_dispatch)).mappings()}
            answer = original(conn, *args, **kwargs)
            for statement in statements:
                statement(conn, before, answer, *args)
            return answer

        return like(original, mutated)

    return plant


def with_arguments(change: Callable[..., tuple[Any, ...]]) -> Plant:
    """The original, called with what ``change`` makes of its arguments."""
    return lambda original: like(original, lambda conn, *args, **more: original(conn, *change(conn, *args), **more))


def _set(conn: Connection, where: Any, **values: Any) -> None:
    conn.execute(sa.update(flow_dispatch).where(where).values(values))


def _drive_row(conn: Connection, flow_id: Any) -> Any:
    return conn.execute(sa.select(flow_dispatch).where(_d.run_id == str(flow_id))).mappings().first()


# ---- 1: the life of a row, and 12: events ---------------------------------------------------------------------------


def end_driver_only(original: Any) -> Any:
    def mutated(conn: Connection, flow_id: Any, at: datetime) -> None:
        conn.execute(sa.delete(flow_dispatch).where(_d.run_id == str(flow_id)))

    return mutated


def end_rows_only(original: Any) -> Any:
    def mutated(conn: Connection, flow_id: Any, at: datetime) -> None:
        conn.execute(sa.delete(flow_dispatch).where(_d.flow_id == flow_id))

    return mutated


def end_silently(original: Any) -> Any:
    def mutated(conn: Connection, flow_id: Any, at: datetime) -> None:
        conn.execute(sa.delete(flow_dispatch).where(_d.flow_id == flow_id))
        still_open = sa.and_(_s.flow_id == flow_id, _s.status.in_(("pending", "running")))
        conn.execute(sa.update(flow_steps).where(still_open).values(status="cancelled"))

    return mutated


def end_without_parent(original: Any) -> Any:
    """The end of a child that does not make its parent's row for it due."""

    def mutated(conn: Connection, flow_id: Any, at: datetime) -> None:
        parent = conn.scalar(sa.select(_d.parent_run_id).where(_d.run_id == str(flow_id)))
        due = conn.scalar(sa.select(_d.due_at).where(_d.run_id == parent))
        original(conn, flow_id, at)
        _set(conn, _d.run_id == parent, due_at=due)

    return mutated


def unwind_fence(conn: Connection, before: Any, answer: Any, what: Change, *_: Any) -> None:
    if isinstance(what.drive, Park):
        _set(conn, _d.run_id == str(what.flow_id), fence=0)


def zero(original: Any) -> Any:
    return lambda *args, **kwargs: 0


# ---- 2, 11: claims and holders --------------------------------------------------------------------------------------


def refuse_paused(original: Any) -> Any:
    """The claim of a flow that is paused, and to be cancelled."""

    def mutated(conn: Connection, flow_id: Any, *args: Any, **kwargs: Any) -> Any:
        paused = conn.scalar(sa.select(flows.c.paused_at).where(flows.c.id == flow_id))
        return None if paused is not None else original(conn, flow_id, *args, **kwargs)

    return like(original, mutated)


def claim_what_is_free(original: Any) -> Any:
    return lambda at, worker, repeat: sa.or_(original(at, worker, repeat), _d.worker.is_(None))


def claim_anything(original: Any) -> Any:
    return lambda at, worker, repeat: sa.true()


def forget_own_token(original: Any) -> Any:
    return lambda at, worker, repeat: original(at, worker, False)


def publish_retry(conn: Connection, before: Any, answer: Any, holder: Any, *_: Any) -> None:
    _set(conn, sa.and_(_d.run_id == holder.run_id, answer), publish_count=1)


def rest_members(conn: Connection, before: Any, answer: Any, what: Change, *_: Any) -> None:
    _set(conn, _d.run_id.in_([member.run_id for member in what.members]), due_at=None)


def keep_crashes(conn: Connection, before: Any, answer: Any, *_: Any) -> None:
    if answer is not None:
        _set(conn, _d.run_id == answer["run_id"], crash_count=before[answer["run_id"]]["crash_count"])


def keep_revision(conn: Connection, before: Any, answer: Any, flow_id: Any, *_: Any) -> None:
    if answer is not None:
        conn.execute(sa.update(flows).where(flows.c.id == flow_id).values(revision=flows.c.revision - 1))


def held_by_run_id(original: Any) -> Any:
    return lambda holder: _d.run_id == holder.run_id


def held_by_fence(original: Any) -> Any:
    return lambda holder: sa.and_(_d.run_id == holder.run_id, _d.fence == holder.fence)


def of_everybody(original: Any) -> Any:
    """Renewal or release of all rows that anybody holds."""

    def mutated(conn: Connection, workers: Any, **values: Any) -> int:
        return conn.execute(sa.update(flow_dispatch).where(_d.worker.isnot(None)).values(values)).rowcount

    return mutated


def stop_everything(original: Any) -> Any:
    """Every row is to be stopped, whether or not its flow is to end."""
    return like(original, lambda conn, workers: [Held("", UUID(int=0), "step", worker) for worker in workers])


def as_the_row_says(conn: Connection, what: Completion) -> Completion:
    """The completion, as if made by whoever holds the row."""
    row = conn.execute(sa.select(_d.fence, _d.worker).where(_d.run_id == what.holder.run_id)).first()
    return what if row is None else replace(what, holder=replace(what.holder, fence=row.fence, worker=row.worker))


def complete_whoever_asks(conn: Connection, what: Completion) -> tuple[Any, ...]:
    return (as_the_row_says(conn, what),)


# ---- 3: the sweep, and crashes --------------------------------------------------------------------------------------


def keep_expired_worker(conn: Connection, before: Any, answer: Any, row: Any, *_: Any) -> None:
    _set(conn, _d.run_id == row["run_id"], worker=row["worker"])


def never_held(original: Any) -> Any:
    def mutated(conn: Connection, *args: Any, **options: Any) -> Any:
        return [replace(row, was_held=False) for row in original(conn, *args, **options)]

    return like(original, mutated)


def publish_first(original: Any) -> Any:
    """A sweep that tells the broker what it is about to write."""

    def list_due(conn: Connection) -> Any:
        return sqlite.sweep(conn, 100, 5.0, 60.0)

    def free(conn: Connection, rows: Any) -> int:
        for row in rows:
            crashes = _d.crash_count + sa.case((_d.worker.is_(None), 0), else_=1)
            _set(conn, _d.run_id == row["run_id"], worker=None, crash_count=crashes, publish_count=1)
        return len(rows)

    def mutated(runtime: Any) -> Any:
        def look(conn: Connection) -> Any:
            with conn.begin_nested() as undone:
                rows = list_due(conn)
                undone.rollback()
            return rows

        rows = runtime.store.run(op.writes(look))
        hints = [dispatch.Hint(row["run_id"], row["flow_id"], row["kind"], row["task"], row["queue"]) for row in rows]
        runtime.publisher.publish(*hints)
        runtime.store.run(op.writes(free), rows)
        return original(runtime)

    return mutated


def give_up_flow(original: Any) -> Any:
    def mutated(conn: Connection, flow_id: Any, fence: int) -> bool:
        row = _drive_row(conn, flow_id)
        if row is not None:
            _set(conn, _d.run_id == str(flow_id), worker=None)
        return bool(original(conn, flow_id, fence if row is None else row["fence"]))

    return like(original, mutated)


def give_up_step(conn: Connection, what: Completion) -> tuple[Any, ...]:
    return (what if what.holder.worker is not None else as_the_row_says(conn, what),)


def forgive_nothing(conn: Connection, what: Change) -> tuple[Any, ...]:
    return (replace(what, forgive=False),)


# ---- 4: wake and park -----------------------------------------------------------------------------------------------


def keep_due(original: Any) -> Any:
    return lambda at, cancels: _d.due_at


def park_blindly(conn: Connection, what: Park) -> tuple[Any, ...]:
    wakes: Any = conn.scalar(sa.select(_d.wakes).where(_d.run_id == what.holder.run_id))
    return (what if wakes is None else replace(what, wakes=wakes),)


def schedule_blindly(conn: Connection, what: Change, park: Park, at: datetime) -> tuple[Any, ...]:
    return (what, *park_blindly(conn, park), at)


def uncount_wake(conn: Connection, before: Any, answer: Any, what: Change, *_: Any) -> None:
    if isinstance(what.drive, Wake) and str(what.flow_id) in before:
        _set(conn, _d.run_id == str(what.flow_id), wakes=before[str(what.flow_id)]["wakes"])


def uncount_wake_of_join(conn: Connection, before: Any, answer: Any, what: Completion, *_: Any) -> None:
    if answer is not None:
        _set(conn, _d.run_id == str(what.flow_id), wakes=before[str(what.flow_id)]["wakes"])


def rest_all_the_same(conn: Connection, before: Any, answer: Any, what: Completion, *_: Any) -> None:
    if answer is not None:
        _set(conn, _d.run_id == str(what.flow_id), due_at=before[str(what.flow_id)]["due_at"])


# ---- 5: joins -------------------------------------------------------------------------------------------------------


def undo_drain(conn: Connection, before: Any, answer: Any, flow_id: Any, *_: Any) -> None:
    _set(conn, _d.run_id == str(flow_id), open_members=before[str(flow_id)]["open_members"])


def count_off_refused(conn: Connection, before: Any, answer: Any, what: Completion, *_: Any) -> None:
    if answer is None:
        _set(conn, _d.run_id == str(what.flow_id), open_members=_d.open_members - 1)


def set_members(conn: Connection, before: Any, answer: Any, what: Change, *_: Any) -> None:
    """``open_members = n`` instead of ``+ n``."""
    if what.members:
        _set(conn, _d.run_id == str(what.flow_id), open_members=len(what.members))


def joined(decide: Callable[[Any, bool, int], tuple[int, bool]]) -> Plant:
    """A completion whose part in the join is what ``decide`` makes of the drive row as it was, of whether the member
    is of the group waited for, and of whether it succeeded: the new ``open_members``, and whether to wake."""

    def plant(original: Any) -> Any:
        def mutated(conn: Connection, what: Completion) -> Any:
            was = _drive_row(conn, what.flow_id)
            group = conn.scalar(sa.select(_d.join_group).where(_d.run_id == what.holder.run_id))
            answer = original(conn, what)
            if answer is None:
                return None
            left, wakes = decide(was, group == was["join_group"], what.good)
            free = was["worker"] is None
            due = sqlite.now(conn) if wakes and free else was["due_at"]
            _set(conn, _d.run_id == str(what.flow_id), open_members=left, wakes=was["wakes"] + wakes, due_at=due)
            return {**answer, "woke": bool(wakes and free)}

        return mutated

    return plant


def _x1(was: Any, own: bool, good: int) -> tuple[int, bool]:
    left = was["open_members"] - 1
    return left, left == 0 or not good


def _decided(was: Any, own: bool, good: int) -> bool:
    return own and (was["join_good"] <= good or was["join_bad"] < 1 - good)


def _x2(was: Any, own: bool, good: int) -> tuple[int, bool]:
    left = was["open_members"] - own
    return left, _decided(was, own, good) or (own and left == 0)


def _x4(was: Any, own: bool, good: int) -> tuple[int, bool]:
    return was["open_members"] - 1, _decided(was, own, good)


one_counter, counter_of_own_group, by_policy_only = joined(_x1), joined(_x2), joined(_x4)


def first_failure_at_once(original: Any) -> Any:
    """A gather's failure is told while other members still run."""

    def mutated(self: Any) -> Any:
        return next(step for step in self._known().values() if step is not None and step.status == "failed")

    return mutated


# ---- 6: external events ---------------------------------------------------------------------------------------------


def forget_look(conn: Connection, before: Any, answer: Any, *_: Any) -> None:
    conn.execute(sa.delete(flow_dispatch).where(_d.kind == "look"))


def keep_in_inbox(conn: Connection, before: Any, answer: Any, key: str, *_: Any) -> None:
    if answer is not None:
        conn.execute(sa.update(flow_inbox).where(_i.consumed_by == answer).values(consumed_by=None))


def newest_first(original: Any) -> Any:
    def mutated(conn: Connection, key: str) -> Any:
        unconsumed = sa.update(flow_inbox).where(_i.consumed_by.is_(None))
        conn.execute(unconsumed.values(position=-_i.position))
        answer = original(conn, key)
        conn.execute(sa.update(flow_inbox).where(_i.position < 0).values(position=-_i.position))
        return answer

    return like(original, mutated)


def announce(original: Any) -> Any:
    """Wakes the first waiter and lets it look for itself, instead of handing the event over."""

    def call_the_first(conn: Connection, key: str) -> Any:
        waits = sa.and_(flows.c.wait_key == key, flows.c.status == "waiting", flows.c.cancel_requested.is_(False))
        oldest = sa.select(flows.c.id).where(waits).order_by(flows.c.rest_at, flows.c.id).limit(1)
        flow_id = conn.scalar(oldest)
        if flow_id is not None:
            at = sqlite.now(conn)
            due = sa.case((_d.worker.is_(None), at), else_=_d.due_at)
            _set(conn, _d.run_id == str(flow_id), wakes=_d.wakes + 1, due_at=due)
        return flow_id

    def mutated(runtime: Any, key: str, *, own: Any = None) -> int:
        if own is not None:
            return int(original(runtime, key, own=own))
        runtime.store.run(op.writes(call_the_first), key)
        return 0

    return mutated


def hand_over_in_time_only(original: Any) -> Any:
    """The waiter whose time is up does not look."""

    def mutated(runtime: Any, key: str, *, own: Any = None) -> int:
        flow = runtime.store.get(own)
        until = flow.wait_json and flow.wait_json.get("timeout_at")
        if until and datetime.fromisoformat(until) <= runtime.store.run(op.now):
            return 0
        return int(original(runtime, key, own=own))

    return mutated


def another_id(conn: Connection, topic: str, correlation_id: str, payload: Any, event_id: Any, pause: float) -> Any:
    return topic, correlation_id, payload, new_id(), pause


# ---- 7, 8: conflicts and history ------------------------------------------------------------------------------------


def write_over(conn: Connection, what: Change) -> tuple[Any, ...]:
    revision = conn.scalar(sa.select(flows.c.revision).where(flows.c.id == what.flow_id))
    return (what if revision is None else replace(what, revision=revision),)


def look_again_at_revision_only(original: Any) -> Any:
    def mutated(self: Driver) -> None:
        standing = self.runtime.store.run(dispatch.standing, self.flow.id)
        assert standing is not None
        self.revision, self.cancel_requested = standing.revision, standing.cancel_requested

    return mutated


def look_again_in_two_statements(original: Any) -> Any:
    def mutated(self: Driver) -> None:
        first = self.runtime.store.run(dispatch.standing, self.flow.id)
        if first is None or first.fence != self.holder.fence:
            raise LeaseLost(self.holder.run_id)
        second = self.runtime.store.run(dispatch.standing, self.flow.id)
        assert second is not None
        self.revision, self.cancel_requested = second.revision, second.cancel_requested

    return mutated


def write_after_cancel(original: Any) -> Any:
    def mutated(self: Driver, outcome: Any, *, illegal_after_cancel: bool = False, **more: Any) -> None:
        original(self, outcome, **more)

    return mutated


def history_before_claim(original: Any) -> Any:
    def mutated(runtime: Any, flow_id: Any, worker: str) -> Any:
        steps = runtime.store.run(dispatch.read_history, flow_id)
        driver = original(runtime, flow_id, worker)
        if driver is not None:
            again = driver.read_history

            def read_history() -> None:
                driver.history = {step.run_id: step for step in steps}
                driver.read_history = again

            driver.read_history = read_history
        return driver

    return mutated


# ---- 9, 15: cancel, lease checks, stopping --------------------------------------------------------------------------


def drain_without_waiting(original: Any) -> Any:
    def mutated(self: Driver) -> None:
        with self.unwinding():
            self.runtime.store.run(dispatch.drain, self.flow.id, self.holder)

    return mutated


def history_once(original: Any) -> Any:
    def mutated(self: Any) -> None:
        if not getattr(self, "_has_read", False):
            self._has_read = True
            original(self)

    return mutated


def never_cleanup(original: Any) -> Any:
    def mutated(*args: Any, cleanup: bool = False) -> Any:
        return original(*args, cleanup=False)

    return mutated


def run_although_cancelled(original: Any) -> Any:
    return lambda runtime, claim, task, delivery: original(
        runtime, replace(claim, cancel_requested=False), task, delivery
    )


def trust_the_lease(original: Any) -> Any:
    return lambda runtime, holder, until: until


def count_as_crash(original: Any) -> Any:
    def mutated(conn: Connection, workers: Any) -> int:
        held = sa.update(flow_dispatch).where(_d.worker.in_(workers))
        values = {"worker": None, "crash_count": _d.crash_count + 1, "publish_count": 0, "due_at": sqlite.now(conn)}
        return conn.execute(held.values(values)).rowcount

    return like(original, mutated)


def rest_handed_back(conn: Connection, before: Any, answer: Any, holder: Any, *_: Any) -> None:
    if answer:
        _set(conn, _d.run_id == holder.run_id, due_at=None)


# ---- 14, 17: keys and mirrors ---------------------------------------------------------------------------------------


def without_key(conn: Connection, flow: Any, *args: Any) -> tuple[Any, ...]:
    return (flow.but(idempotency_key=None), *args)


def observe_anything(original: Any) -> Any:
    def mutated(conn: Connection, step: Any, write_id: Any = None) -> Any:
        known = op.find_step_by_run_id(conn, step.flow_id, step.run_id)
        runtime = step.runtime if known is None else known.runtime
        row = sqlite.observe(conn, step.but(runtime=runtime), write_id)
        return known if row is None else FlowStep.of_row(row)

    return like(original, mutated)


# ---- async functions side by side -----------------------------------------------------------------------------------


def always(original: Any) -> Any:
    """Says yes."""
    return lambda *args: True


def raise_at_once(original: Any) -> Any:
    def mutated(self: Any, member: Any, outcome: Any) -> None:
        if isinstance(outcome, StepFailed):
            raise outcome
        original(self, member, outcome)

    return mutated


def end_nothing(original: Any) -> Any:
    async def mutated(tasks: Any) -> None: ...

    return mutated
