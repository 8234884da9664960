"""What must hold after every transaction, whoever made it. The numbers are those of the rules' own list."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from celery_flows.store.script import Call
from tests.simulation.world import Actor, SimulatedStore, Violation, World, short

TERMINAL = ("finished", "failed", "cancelled")
OPEN_STEP = ("pending", "running")
HELD = {
    "park": "park",
    "hand_back": "hand back",
    "retry_step": "retry",
    "renew_own": "renew",
    "complete_step": "complete",
}

DISPATCH = (
    "run_id, flow_id, kind, task, worker, fence, wakes, due_at, publish_count, crash_count, open_members, join_group, "
    "join_good, join_bad"
)


class Observer:
    """Looks at the whole database before and after each transaction."""

    def __init__(self, store: SimulatedStore) -> None:
        self._connection: Any = store.engine.raw_connection().driver_connection
        self.reset()

    def reset(self) -> None:
        """Forgets the run before."""
        self.ended: dict[str, tuple[Any, ...]] = {}
        self.closed: dict[str, tuple[Any, ...]] = {}
        self.consumed: dict[str, str] = {}
        self.drive_rows_gone: set[str] = set()

    def rows(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return list(self._connection.execute(query, parameters))

    def dispatch(self) -> dict[str, dict[str, Any]]:
        names = DISPATCH.split(", ")
        return {
            row[0]: dict(zip(names, row, strict=True)) for row in self.rows(f"SELECT {DISPATCH} FROM flow_dispatch")
        }

    def before(self, actor: Actor | None, step: Call) -> dict[str, dict[str, Any]]:
        return self.dispatch()

    def after(self, actor: Actor | None, step: Call, before: dict[str, Any], answer: Any, *, failed: bool) -> None:
        now = self.dispatch()
        if actor is not None and not failed:
            self._check_claim(actor, step, before, answer)
            self._check_holder(actor, step, before, answer)
            self._note_backoff(step, answer)
        self._check_growth(before, now)
        self._check_flows(now)
        self._check_steps()
        self._check_joins(now)
        self._check_inbox(now)

    # (7) no claim before its time
    def _check_claim(self, actor: Actor, step: Call, before: dict[str, Any], answer: Any) -> None:
        name = step.operation.__name__
        if name not in ("claim_drive", "claim_step") or answer is None:
            return
        run_id = answer.holder.run_id
        row = before[run_id]
        clock = World.current.clock.strftime("%Y-%m-%d %H:%M:%S.%f")
        due = row["due_at"] is not None and row["due_at"] <= clock
        published = row["worker"] is None and row["publish_count"] > 0
        if not due and not published:
            raise Violation(f"(7) {actor.name} claimed {short(run_id)} before its time: {row}")
        actor.claims[run_id] = answer.holder.fence

    def _note_backoff(self, step: Call, answer: Any) -> None:
        if step.operation.__name__ == "retry_step" and answer:
            holder, _, _, delay, _ = step.args
            World.current.not_before[holder.run_id] = World.current.clock + timedelta(seconds=delay)

    # (6) nothing is written by a holder who is not the row's
    def _check_holder(self, actor: Actor, step: Call, before: dict[str, Any], answer: Any) -> None:
        name = step.operation.__name__
        if name == "change_flow":
            run_id = str(step.args[0].flow_id)
            if run_id in actor.claims:
                self._must_hold(actor, run_id, before, name)
        elif name in HELD and answer:
            holder = getattr(step.args[0], "holder", step.args[0])
            if holder.worker is not None:
                self._must_hold(actor, holder.run_id, before, name)

    def _must_hold(self, actor: Actor, run_id: str, before: dict[str, Any], name: str) -> None:
        row = before.get(run_id)
        if row is None or row["fence"] != actor.claims.get(run_id):
            raise Violation(
                f"(6) {name} by {actor.name}, which was overtaken: fence {actor.claims.get(run_id)}, row {row}"
            )

    # (5) fence and wakes never fall; a drive row comes once
    def _check_growth(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        for run_id, row in now.items():
            old = before.get(run_id)
            if old is not None and (row["fence"] < old["fence"] or row["wakes"] < old["wakes"]):
                raise Violation(f"(5) fence or wakes fell: {old} -> {row}")
            if old is None and run_id in self.drive_rows_gone:
                raise Violation(f"(5) the drive row of {short(run_id)} came back: its fence begins anew")
            if row["crash_count"] > len(World.current.lost.get(run_id, ())):
                raise Violation(f"(11) more crashes counted than there were: {row}")
        self.drive_rows_gone |= {
            run_id for run_id, row in before.items() if row["kind"] == "drive" and run_id not in now
        }

    # (2), (3), (4)
    def _check_flows(self, now: dict[str, Any]) -> None:
        told = {
            flow_id: (count, least, most)
            for flow_id, count, least, most in self.rows(
                "SELECT flow_id, count(*), min(revision), max(revision) FROM flow_events "
                "WHERE revision IS NOT NULL GROUP BY flow_id"
            )
        }
        driven = {row["flow_id"] for row in now.values() if row["kind"] == "drive"}
        for flow in self.rows(
            "SELECT id, status, revision, updated_at, result_json, state_json, cancel_requested FROM flows"
        ):
            flow_id, status, revision = flow[:3]
            if told.get(flow_id) != (revision, 1, revision):
                raise Violation(
                    f"(2) flow {short(flow_id)} is at revision {revision}, its events at {told.get(flow_id)}"
                )
            if flow_id in self.ended and self.ended[flow_id] != flow:
                raise Violation(f"(3) an ended flow changed: {self.ended[flow_id]} -> {flow}")
            if status in TERMINAL:
                self.ended[flow_id] = flow
                if any(row["flow_id"] == flow_id for row in now.values()):
                    raise Violation(f"(3) flow {short(flow_id)} has ended and still has dispatch rows")
            elif flow_id not in driven:
                raise Violation(f"(4) open flow {short(flow_id)} has no drive row")

    # (1), (3)
    def _check_steps(self) -> None:
        for row in self.rows("SELECT flow_id, run_id, status, result_json, error_json FROM flow_steps"):
            flow_id, run_id, status = row[:3]
            if run_id in self.closed and self.closed[run_id] != row:
                raise Violation(f"(1) a recorded step changed: {self.closed[run_id]} -> {row}")
            if status not in OPEN_STEP:
                self.closed[run_id] = row
            elif flow_id in self.ended:
                raise Violation(f"(3) step {run_id} of ended flow {short(flow_id)} is {status}")

    # (10)
    def _check_joins(self, now: dict[str, Any]) -> None:
        members: dict[str, int] = {}
        for row in now.values():
            if row["kind"] == "step":
                members[row["flow_id"]] = members.get(row["flow_id"], 0) + 1
        for row in now.values():
            if row["kind"] != "drive":
                continue
            if row["open_members"] != members.get(row["flow_id"], 0):
                raise Violation(
                    f"(10) open_members {row['open_members']}, rows {members.get(row['flow_id'], 0)}: {row}"
                )
            at_rest = row["worker"] is None and row["due_at"] is None and row["publish_count"] == 0
            if at_rest and not self._waits(row["flow_id"]) and row["open_members"] == 0:
                raise Violation(f"(10) a drive row rests with nothing to wait for: {row}")
            decided = row["join_good"] <= 0 or row["join_bad"] < 0
            if at_rest and not self._waits(row["flow_id"]) and decided and not self._drains(row["flow_id"]):
                raise Violation(f"(10) a drive row rests with its join met: {row}")

    def _waits(self, flow_id: str) -> bool:
        return bool(
            self.rows("SELECT 1 FROM flows WHERE id = ? AND (status = 'waiting' OR paused_at IS NOT NULL)", flow_id)
        )

    def _drains(self, flow_id: str) -> bool:
        """While it drains, a flow waits for all its members, whatever its join says."""
        return bool(self.rows("SELECT 1 FROM flow_dispatch WHERE flow_id = ? AND kind = 'step'", flow_id))

    # (9), (10)
    def _check_inbox(self, now: dict[str, Any]) -> None:
        pending: set[str] = set()
        for event_id, key, consumed_by in self.rows(
            "SELECT id, event_key, consumed_by FROM flow_inbox ORDER BY position"
        ):
            if event_id in self.consumed and self.consumed[event_id] != consumed_by:
                raise Violation(f"(9) event {short(event_id)} was consumed twice")
            if consumed_by is not None and event_id not in self.consumed:
                if key in pending:
                    raise Violation(f"(9) event {short(event_id)} was consumed before an older one")
                self.consumed[event_id] = consumed_by
            if consumed_by is None:
                pending.add(key)
        looks = any(row["kind"] == "look" for row in now.values())
        for flow_id, key in self.rows(
            "SELECT id, wait_key FROM flows WHERE wait_key IS NOT NULL AND cancel_requested = 0"
        ):
            row = next((r for r in now.values() if r["flow_id"] == flow_id and r["kind"] == "drive"), None)
            rests = row is not None and row["worker"] is None and row["due_at"] is None
            if key in pending and rests and not looks:
                raise Violation(f"(10) flow {short(flow_id)} rests, its event lies there, and nobody will look")

    # (8), (12): asked by the steps' bodies
    def begin_step(self, actor: Actor | None, flow_id: str, run_id: str, *, cleanup: bool = False) -> None:
        """A step's body begins: is it recorded already? Is a member leased beside cleanup?"""
        flow = flow_id.replace("-", "")
        recorded = self.rows(
            "SELECT 1 FROM flow_steps WHERE flow_id = ? AND run_id = ? AND status IN ('succeeded', 'failed')",
            flow,
            run_id,
        )
        rows = self.dispatch()
        if recorded and actor is not None:
            # One that was cancelled by hand after its claim may still begin: it has no result to lose. And an
            # overtaken worker could, in the instant between the look at its lease and the call: no stop here.
            raise Violation(f"(8) {actor.name} begins a recorded step")
        if cleanup and any(
            r["flow_id"] == flow and r["kind"] == "step" and r["worker"] is not None for r in rows.values()
        ):
            mine_only = [
                r for r in rows.values() if r["kind"] == "step" and r["worker"] is not None and r["flow_id"] == flow
            ]
            raise Violation(f"(12) cleanup runs beside a running member: {json.dumps(mine_only)}")
