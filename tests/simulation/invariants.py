"""What must hold after every transaction, whoever made it. The numbers are those of the rules' own list."""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime, timedelta
from typing import Any

from celery_flows.store.changes import ORDER
from celery_flows.store.limits import RATE_POLL_SECONDS, Bounds
from celery_flows.store.models import Flow
from celery_flows.store.operations import Mode
from celery_flows.store.script import Call
from tests.simulation.history import Histories
from tests.simulation.world import Actor, SimulatedStore, Violation, World, as_text, short

OF_A_HOLDER = ("park", "hand_back", "end_lease", "retry_step", "renew_own", "complete_step")
BY_TOKEN = ("release", "renew", "hand_back_all")
TAKES_OVER = ("sweep_due", "claim_drive", "claim_step")
NO_MEMBERS = ("sleep", "wait_for topic", "flaky", "flaky_beside")  # steps that may be open and have no row of their own

PAUSED = "(paused_at IS NOT NULL AND NOT cancel_requested)"  # nobody drives such a flow
DISPATCH = (
    "run_id, flow_id, kind, task, worker, fence, wakes, due_at, publish_count, crash_count, open_members, join_group, "
    "join_good, join_bad, limit_key, has_slot, queued_at"
)
NAMES = DISPATCH.split(", ")

Row = dict[str, Any]
Rows = dict[str, Row]


def is_member(row: Row) -> bool:
    """Whether a dispatch row is a member's: a Celery step's, or a child flow's, but no order to cancel one."""
    return row["kind"] in ("step", "child") and not row["run_id"].startswith(ORDER)


class Observer:
    """Looks at the whole database after each transaction, and compares."""

    def __init__(self, store: SimulatedStore) -> None:
        self._connection: Any = store.engine.raw_connection().driver_connection
        self.bounds: dict[str, Bounds] = {}  # of limited definitions, by name
        self.reset()

    def reset(self) -> None:
        """Forgets the run before."""
        self.histories = Histories(self.rows)
        self._before: Rows = {}
        self._consumed: dict[str, str] = {}
        self._drive_rows_gone: set[str] = set()
        self._starts: dict[str, list[float]] = {}  # by limit: when flows were let begin

    def rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return list(self._connection.execute(query, parameters))

    def dispatch(self) -> Rows:
        rows = self.rows(f"SELECT {DISPATCH} FROM flow_dispatch")
        return {row[0]: dict(zip(NAMES, row, strict=True)) for row in rows}

    def after(self, actor: Actor | None, step: Call, answer: Any, *, failed: bool) -> None:
        """Told of every transaction.

        Raises:
            Violation: something must not be so.
        """
        name = step.operation.__name__
        if step.operation.mode in (Mode.READ, Mode.SNAPSHOT):  # type: ignore[attr-defined]
            return
        before, now = self._before, self.dispatch()
        self._before = now
        self.histories.check()
        if actor is not None and not failed:
            self._check_claim(actor, name, step, before, now, answer)
            self._check_holder(actor, name, step, before, now)
            self._check_looks(actor, name, step)
            self._note_records(actor, name, step, answer)
        self._check_leases(actor, name, step, before, now)
        self._check_growth(name, before, now)
        self._check_flows(now)
        self._check_count(now)
        self._check_rest(now)
        self._check_inbox(now)
        self._check_limits(before, now)

    # (7) no claim before its time
    def _check_claim(self, actor: Actor, name: str, step: Call, before: Rows, now: Rows, answer: Any) -> None:
        if name not in ("claim_drive", "claim_step"):
            return
        run_id, worker = str(step.args[0]), step.args[1]
        if answer is None:
            if run_id in now and now[run_id]["worker"] == worker:
                raise Violation(f"(11) {actor.name} holds {short(run_id)} and was told that it does not")
            return
        row = before[run_id]
        due = row["due_at"] is not None and row["due_at"] <= as_text(World.current.clock)
        published = row["worker"] is None and row["publish_count"] > 0
        if not due and not published and row["worker"] != worker:  # its own: it asks again after a lost reply
            raise Violation(f"(7) {actor.name} claimed {short(run_id)} before its time: {row}")
        if row["limit_key"] is not None and not row["has_slot"] and not self._is_to_end(answer.flow):
            raise Violation(f"(13) {actor.name} claimed {short(run_id)} without a slot: {row}")
        actor.claims[run_id] = answer.holder.fence

    def _is_to_end(self, flow: Flow) -> bool:
        late = flow.deadline_at is not None and flow.deadline_at <= World.current.clock
        return flow.cancel_requested or late

    # (6) nothing is written by a holder who is not the row's
    def _check_holder(self, actor: Actor, name: str, step: Call, before: Rows, now: Rows) -> None:
        if name == "change_flow":
            if step.args[0].kind == "history_refused":  # nobody changes his code here; a cancel would hide it
                raise Violation(f"{actor.name} comes to other steps than its history has")
            run_id = str(step.args[0].flow_id)
            if run_id in actor.claims and before[run_id]["fence"] != actor.claims[run_id]:
                raise Violation(f"(6) {name} by {actor.name}, which was overtaken: {before[run_id]}")
        elif name == "fail_lost":
            self._must_hold(actor, name, before, now, str(step.args[0]), (step.args[1], None))
        elif name == "drain" or name in OF_A_HOLDER:
            asked = step.args[1] if name == "drain" else step.args[0]
            holder = getattr(asked, "holder", asked)
            self._must_hold(actor, name, before, now, holder.run_id, (holder.fence, holder.worker))

    def _must_hold(
        self, actor: Actor, name: str, before: Rows, now: Rows, run_id: str, mine: tuple[int, str | None]
    ) -> None:
        row = before.get(run_id)
        if row != now.get(run_id) and (row is None or (row["fence"], row["worker"]) != mine):
            raise Violation(f"(6) {name} by {actor.name} as {mine}, but the row is {row}")

    # (6), (11) a lease ends by its holder, its holder's death, its time, or with the flow; else nobody touches it
    def _check_leases(self, actor: Actor | None, name: str, step: Call, before: Rows, now: Rows) -> None:
        clock = as_text(World.current.clock)
        for run_id, row in before.items():
            if row["worker"] is None or (after := now.get(run_id)) is None:
                continue
            kept = after["worker"] == row["worker"] and after["due_at"] is not None and after["due_at"] >= row["due_at"]
            own = actor is not None and actor.holds(row["worker"])
            if kept and (name != "renew" or after["due_at"] == row["due_at"] or self._is_named(step, row)):
                continue
            ended = row["due_at"] <= clock and name in TAKES_OVER
            freed = name in ("release", "hand_back_all") and self._is_named(step, row)
            if not (own or ended or (freed and self._is_dead(row["worker"]))):
                raise Violation(f"(6) {name} touches a lease that is somebody else's: {row} -> {after}")

    def _is_named(self, step: Call, row: Row) -> bool:
        return any(row["worker"] == token or row["worker"].startswith(f"{token}/") for token in step.args[0])

    def _is_dead(self, worker: str) -> bool:
        return all(actor.dead for actor in World.current.actors if actor.holds(worker))

    # (5) fence and wakes never fall; a drive row comes once. (11) crashes are counted, each once
    def _check_growth(self, name: str, before: Rows, now: Rows) -> None:
        for run_id, row in now.items():
            old = before.get(run_id)
            if old is None and run_id in self._drive_rows_gone:
                raise Violation(f"(5) the drive row of {short(run_id)} came back: its fence begins anew")
            if row["crash_count"] > len(World.current.uncounted.get(run_id, ())):
                raise Violation(f"(11) more crashes counted than there were since the last record: {row}")
            if old is None:
                continue
            if row["fence"] < old["fence"] or row["wakes"] < old["wakes"]:
                raise Violation(f"(5) fence or wakes fell: {old} -> {row}")
            taken = old["worker"] is not None and old["worker"] != row["worker"]
            if taken and name in (*TAKES_OVER, "release") and row["crash_count"] != old["crash_count"] + 1:
                raise Violation(f"(11) a lost lease is not counted as a crash: {old} -> {row}")
        self._drive_rows_gone |= {i for i, row in before.items() if row["kind"] == "drive" and i not in now}

    def _note_records(self, actor: Actor, name: str, step: Call, answer: Any) -> None:
        """A record by its owner forgives the crashes before it; a retry begins after its backoff."""
        world = World.current
        if name == "change_flow":
            change = step.args[0]
            if str(change.flow_id) in actor.claims and (change.step is not None or change.members):
                world.uncounted.setdefault(str(change.flow_id), set()).intersection_update(
                    {actor.claims[str(change.flow_id)]}
                )
            if change.kind == "step_retrying":
                told = change.step.error["retry_at"]
                world.not_before[change.step.run_id] = datetime.fromisoformat(told)
        elif name == "retry_step" and answer:
            holder, _, _, delay, _ = step.args
            world.not_before[holder.run_id] = world.clock + timedelta(seconds=delay)
            world.uncounted.pop(holder.run_id, None)

    # (4)
    def _check_flows(self, now: Rows) -> None:
        driven = {row["flow_id"] for row in now.values() if row["kind"] == "drive"}
        owned = {row["flow_id"] for row in now.values()}
        for flow in self.histories.flows.values():
            if flow.status.is_terminal and flow.id.hex in owned:
                raise Violation(f"(3) flow {short(flow.id)} has ended and still has dispatch rows")
            if not flow.status.is_terminal and flow.id.hex not in driven:
                raise Violation(f"(4) open flow {short(flow.id)} has no drive row")

    # (10) open_members = member rows = open steps
    def _check_count(self, now: Rows) -> None:
        members = {run_id for run_id, row in now.items() if is_member(row)}
        steps = self.histories.steps.values()
        open_steps = {s.run_id for s in steps if not s.status.is_terminal and s.task not in NO_MEMBERS}
        if members != open_steps:
            raise Violation(f"(10) member rows {members} are not the open steps {open_steps}")
        for row in now.values():
            if row["kind"] == "drive":
                count = sum(now[run_id]["flow_id"] == row["flow_id"] for run_id in members)
                if row["open_members"] != count:
                    raise Violation(f"(10) open_members {row['open_members']}, rows {count}: {row}")

    # (10) no drive row at rest with its join met
    def _check_rest(self, now: Rows) -> None:
        for row in now.values():
            at_rest = row["worker"] is None and row["due_at"] is None and row["publish_count"] == 0
            if row["queued_at"] is not None:
                continue
            if row["kind"] != "drive" or not at_rest or self._waits(row["flow_id"]):
                continue
            members = sum(is_member(other) and other["flow_id"] == row["flow_id"] for other in now.values())
            if members == 0:
                raise Violation(f"(10) a drive row rests with nothing to wait for: {row}")
            # Where a join is decided and members are left, the driver that rests has met it, and drains.

    def _waits(self, flow_id: str) -> bool:
        waiting = f"SELECT 1 FROM flows WHERE id = ? AND (status = 'waiting' OR {PAUSED})"
        return bool(self.rows(waiting, flow_id))

    # (9) the driver looks before it takes a timeout
    def _check_looks(self, actor: Actor, name: str, step: Call) -> None:
        if name == "hand_over_next":
            (last,) = self.rows("SELECT max(position) FROM flow_inbox WHERE event_key = ?", step.args[0])[0]
            actor.looked[step.args[0]] = last or 0
        elif name == "change_flow" and step.args[0].payload.get("timed_out"):
            waiting = self.rows("SELECT event_key, position FROM flow_inbox WHERE consumed_by IS NULL")
            if any(actor.looked.get(key, position) >= position for key, position in waiting):
                raise Violation(f"(9) {actor.name} took a timeout, and the event lay in the inbox")

    # (9), (10)
    def _check_inbox(self, now: Rows) -> None:
        inbox = self.rows("SELECT id, event_key, consumed_by FROM flow_inbox ORDER BY position")
        pending: set[str] = set()
        for event_id, key, consumed_by in inbox:
            if event_id in self._consumed and self._consumed[event_id] != consumed_by:
                raise Violation(f"(9) event {short(event_id)} was consumed twice")
            if consumed_by is not None and event_id not in self._consumed:
                if key in pending:
                    raise Violation(f"(9) event {short(event_id)} was consumed before an older one")
                self._consumed[event_id] = consumed_by
            if consumed_by is None:
                pending.add(key)
        if not pending or any(row["kind"] == "look" for row in now.values()):
            return
        waiting = "SELECT id, wait_key FROM flows WHERE wait_key IS NOT NULL AND cancel_requested = 0"
        for flow_id, key in self.rows(waiting):
            row = next((r for r in now.values() if r["flow_id"] == flow_id and r["kind"] == "drive"), None)
            rests = row is not None and row["worker"] is None and row["due_at"] is None
            if key in pending and rests:
                raise Violation(f"(10) flow {short(flow_id)} rests, its event lies there, and nobody will look")

    # (13) never more slots than the limit says, nor more starts. (14) while somebody queues, somebody will look
    def _check_limits(self, before: Rows, now: Rows) -> None:
        held = Counter(row["limit_key"] for row in now.values() if row["has_slot"])
        for key, count in held.items():
            at_once = self.bounds[json.loads(key)[0]].at_once
            if at_once is not None and count > at_once:
                raise Violation(f"(13) {count} flows have a slot of {key}")
        for run_id, row in now.items():
            if row["has_slot"] and row["fence"] == 0 and not before.get(run_id, row)["has_slot"]:
                self._note_start(row["limit_key"])
        due = dict(self.rows("SELECT key, due_at FROM flow_limits"))
        for row in now.values():
            if row["queued_at"] is None or self._is_paused(row["flow_id"]):
                continue
            soon = as_text(World.current.clock + timedelta(seconds=RATE_POLL_SECONDS))
            looks = row["due_at"], due.get(row["limit_key"])
            if not any(look is not None and look <= soon for look in looks):
                raise Violation(f"(14) somebody queues, and nobody will look: {row}")

    def _note_start(self, key: str) -> None:
        starts, bounds = self._starts.setdefault(key, []), self.bounds[json.loads(key)[0]]
        starts.append(World.current.boottime())
        if bounds.starts is None or len(starts) <= bounds.starts:
            return
        if starts[-1] - starts[-1 - bounds.starts] < bounds.window_seconds:
            raise Violation(f"(13) more than {bounds.starts} of {key} began within its window: {starts}")

    def _is_paused(self, flow_id: str) -> bool:
        return bool(self.rows(f"SELECT 1 FROM flows WHERE id = ? AND {PAUSED}", flow_id))

    # (8), (12): asked by the steps' bodies
    def begin_step(self, actor: Actor | None, flow_id: str, run_id: str, *, cleanup: bool = False) -> None:
        """A step's body begins: is it recorded already? Is a member leased beside cleanup? Was the worker to stop?"""
        flow = flow_id.replace("-", "")
        recorded = "SELECT 1 FROM flow_steps WHERE flow_id = ? AND run_id = ? AND status IN ('succeeded', 'failed')"
        if self.rows(recorded, flow, run_id) and actor is not None:
            # One that was cancelled by hand after its claim may still begin: it has no result to lose. And an
            # overtaken worker could, in the instant between the look at its lease and the call: no stop here.
            raise Violation(f"(8) {actor.name} begins a recorded step")
        if actor is not None and actor.stopping:
            actor.begun_stopping += 1
            if actor.begun_stopping > 1:  # the one it was just about to begin
                raise Violation(f"{actor.name} was told to stop, and begins one step after another")
        if cleanup:
            out = [row for row in self.dispatch().values() if is_member(row)]
            held = [row for row in out if row["kind"] == "child" or row["worker"] is not None]
            if mine := [row for row in held if row["flow_id"] == flow]:
                raise Violation(f"(12) cleanup runs beside a running member: {json.dumps(mine)}")
