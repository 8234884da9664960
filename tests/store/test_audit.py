"""The proof by audit, over each database: whole histories are passed over, each kind of damage is found and named, no
finding tells a value, and neither a busy nor a long flow puts it out."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from celery_flows import FlowCancelled, FlowHandle, FlowStepStatus, Run, StepFailed
from celery_flows.store import Flow, FlowManager, SqlFlowStore, audit
from celery_flows.store import operations as op
from celery_flows.store.audit import Finding
from celery_flows.store.fold import FLOW_FIELDS, STEP_FIELDS, Fold, differing
from celery_flows.store.tables import flow_dispatch, flow_events, flow_steps, flows
from tests.support import fold as independent
from tests.support.bench import Bench
from tests.support.driving import Driving
from tests.support.samples import NAMES

SECRET = "hunter2"
LONG, MOMENT = timedelta(days=1), timedelta(milliseconds=5)
_e, _s, _f, _d = flow_events.c, flow_steps.c, flows.c, flow_dispatch.c


@pytest.fixture
def bench(database_url: str, store: SqlFlowStore) -> Iterator[Bench]:
    """Flows that are driven, over the same database."""
    del store
    with closing(Bench(database_url)) as opened:
        yield opened


def found(store: SqlFlowStore, **what: Any) -> list[Finding]:
    """What an audit finds. Whatever that is, it must not tell a value."""
    findings = list(audit.verify(store, **what))
    assert [finding for finding in findings if SECRET in str(finding) + repr(finding)] == []
    return findings


# ---- every kind of flow ---------------------------------------------------------------------------------------------


def fill(bench: Bench) -> dict[str, UUID]:
    """Flows of every kind, by name; each carries the secret wherever it can."""
    return {**by_hand(bench.flows.manager), **driven(bench)}


def by_hand(manager: FlowManager) -> dict[str, UUID]:
    def new(**fields: Any) -> UUID:
        return manager.create_managed(**NAMES, state_json={"card": SECRET}, **fields).id

    made = {name: new(goal=name) for name in ("created", "running", "waiting", "finished", "failed", "cancelled")}
    for name in ("running", "waiting", "finished", "failed"):
        manager.start_running(made[name])
    event = {"kind": "external_event", "topic": "t", "correlation_id": "c"}
    manager.set_waiting(made["waiting"], {**event, "timeout_at": datetime(2999, 1, 1, tzinfo=UTC)})
    manager.update_state(made["running"], {"cvc": SECRET}, "next")
    manager.pause(made["running"])
    manager.unpause(made["running"])
    manager.set_waiting(made["failed"], {"kind": "manual"})
    manager.resume(made["failed"], {"resumed": SECRET})
    manager.fail(made["failed"], f"no {SECRET}")
    seen: dict[str, Any] = {"flow_id": made["finished"], "run_id": "seen", "task": "seen"}
    manager.record_step_observation(**seen, status=FlowStepStatus.RUNNING, child_session_key="child")
    manager.record_step_observation(**seen, status=FlowStepStatus.SUCCEEDED, result_json=SECRET)
    manager.finish(made["finished"], {"done": SECRET})
    open_step: dict[str, Any] = {"flow_id": made["cancelled"], "run_id": "open", "task": "open"}
    manager.record_step_observation(**open_step, status=FlowStepStatus.RUNNING)
    manager.request_cancel(made["cancelled"])
    manager.cancel(made["cancelled"])
    mirrored = manager.create_mirrored(**NAMES, deadline_at=datetime(2999, 1, 1, tzinfo=UTC))
    keyed = new(idempotency_key="k", parent_flow_id=made["running"], requester_origin="web")
    manager.store.append_event(keyed, "noted", {"by": "hand", "step": SECRET, "run_id": SECRET, "set": SECRET})
    return {**made, "mirrored": mirrored.id, "keyed": keyed}


def driven(bench: Bench) -> dict[str, UUID]:
    def secret() -> str:
        return SECRET

    def fails() -> None:
        raise ValueError(SECRET)

    @bench.task("member")
    def member(number: int) -> int:
        if number == 2:
            raise ValueError(SECRET)
        return number

    @bench.task("flaky", bind=True, max_retries=3)
    def flaky(self: Any) -> str:
        if self.request.retries < 2:
            raise self.retry(exc=ValueError(SECRET), countdown=0)
        return SECRET

    @bench.flows.flow("everything")
    def everything(run: Run, card: str) -> list[Any]:
        done: list[Any] = [run.step(secret), *run.gather(member.s(number) for number in (1, 3, 4)), run.step(flaky)]
        for failing in (lambda: run.step(fails), lambda: run.gather(member.s(number) for number in (1, 2, 3))):
            try:
                failing()
            except StepFailed as failed:
                done.append(failed.message)
        run.sleep(MOMENT)
        return [*done, run.wait_for("approval", card)]

    @bench.flows.flow("saga")
    def saga(run: Run) -> None:
        run.step(secret)
        try:
            run.sleep(LONG)
        except FlowCancelled:
            run.step(secret)
            run.step(member, 1)
            raise

    @bench.flows.flow("pauses")
    def pauses(run: Run) -> str:
        return run.step(secret)

    @bench.flows.flow("fails")
    def failing(run: Run) -> None:
        run.step(fails)

    @bench.flows.flow("gathers")
    def gathers(run: Run) -> list[int]:
        return run.gather(member.s(number) for number in range(4))

    started: dict[str, FlowHandle[Any]] = {"paused": pauses.start()}
    bench.flows.manager.pause(started["paused"].id)
    bench.drive(started["paused"].id)
    bench.flows.manager.unpause(started["paused"].id)
    started |= {"saga": saga.start(), "driven to fail": failing.start(), "sleeping": saga.start()}
    started["everything"] = everything.start(SECRET, key="everything", owner="tenant:acme", goal="all of it")
    bench.work()
    started["saga"].cancel()
    bench.flows.emit("approval", SECRET, {"card": SECRET})
    assert bench.finish(started["everything"])[-1] == {"card": SECRET}
    started |= {"gathering": gathers.start(), "unclaimed": pauses.start()}
    bench.drive(started["gathering"].id)
    expected = {
        "saga": "cancelled", "paused": "finished", "driven to fail": "failed", "sleeping": "waiting",
        "unclaimed": "created", "everything": "finished", "gathering": "running",
    }  # fmt: skip
    assert {name: handle.status().value for name, handle in started.items()} == expected
    return {name: handle.id for name, handle in started.items()}


def test_flows_of_every_kind_are_passed_over_in_silence(bench: Bench, store: SqlFlowStore) -> None:
    made, looked_at = fill(bench), list[int]()
    assert found(store, progress=looked_at.append) == []
    assert looked_at == list(range(1, len(made) + 1))


def test_both_folds_give_every_row_back(bench: Bench, store: SqlFlowStore) -> None:
    """The one under test, and the one that was written apart from it for the tests."""
    for name, flow_id in fill(bench).items():
        events = store.list_events(flow_id, None)[::-1]
        told = [event for event in events if event.kind != "noted"]
        fold, flow = Fold().add_all(events), store.get(flow_id)
        assert flow is not None
        assert independent.fold_flow(told) == flow, name
        assert differing(independent.fold_flow(told), fold.flow, FLOW_FIELDS) == [], name
        steps = independent.fold_steps(told)
        assert steps == {step.run_id: step for step in store.list_steps(flow_id)}, name
        assert steps.keys() == fold.steps.keys(), name
        assert {run_id: differing(step, fold.steps[run_id], STEP_FIELDS) for run_id, step in steps.items()} == dict(
            zip(steps, [list[str]()] * len(steps), strict=True)
        ), name
        assert list(fold.revisions) == list(range(1, flow.revision + 1)), name
        wrong = [*fold.untold, *fold.disordered, *fold.torn, *fold.revisions.missing(flow.revision)]
        assert wrong == [], name


# ---- damage ---------------------------------------------------------------------------------------------------------

Damage = Callable[[sa.Connection, UUID], Any]


def changed(column: str, value: Any) -> Damage:
    return lambda conn, flow_id: conn.execute(sa.update(flows).where(_f.id == flow_id).values({column: value}))


def changed_step(task: str, **values: Any) -> Damage:
    def damage(conn: sa.Connection, flow_id: UUID) -> Any:
        return conn.execute(sa.update(flow_steps).where(_s.flow_id == flow_id, _s.task == task).values(values))

    return damage


def without_event(kind: str, *, revised: bool | None = None) -> Damage:
    def damage(conn: sa.Connection, flow_id: UUID) -> Any:
        mine = sa.select(sa.func.min(_e.id)).where(_e.flow_id == flow_id, _e.kind == kind)
        if revised is not None:
            mine = mine.where(_e.revision.is_not(None) if revised else _e.revision.is_(None))
        return conn.execute(sa.delete(flow_events).where(_e.id == mine.scalar_subquery()))

    return damage


def without_nth_event(task: str, kind: str, number: int) -> Damage:
    """Of the one step of this task, the ``number``-th event of this kind."""

    def damage(conn: sa.Connection, flow_id: UUID) -> Any:
        run_id = conn.scalar(sa.select(_s.run_id).where(_s.flow_id == flow_id, _s.task == task))
        told = conn.execute(sa.select(_e.id, _e.payload_json).where(_e.flow_id == flow_id, _e.kind == kind))
        ids = sorted(id_ for id_, payload in told if payload["run_id"] == run_id)
        return conn.execute(sa.delete(flow_events).where(_e.id == ids[number - 1]))

    return damage


def changed_row(kind: str, **values: Any) -> Damage:
    """Of the first dispatch row of this kind."""

    def damage(conn: sa.Connection, flow_id: UUID) -> Any:
        first = sa.select(sa.func.min(_d.run_id)).where(_d.flow_id == flow_id, _d.kind == kind).scalar_subquery()
        return conn.execute(sa.update(flow_dispatch).where(_d.run_id == first).values(values))

    return damage


def without_member_row(conn: sa.Connection, flow_id: UUID) -> Any:
    first = sa.select(sa.func.min(_d.run_id)).where(_d.flow_id == flow_id, _d.kind == "step").scalar_subquery()
    return conn.execute(sa.delete(flow_dispatch).where(_d.run_id == first))


def without_step(conn: sa.Connection, flow_id: UUID) -> Any:
    return conn.execute(sa.delete(flow_steps).where(_s.flow_id == flow_id, _s.task == "secret"))


def with_step(conn: sa.Connection, flow_id: UUID) -> Any:
    at = datetime.now(UTC)
    row = {"id": uuid4(), "flow_id": flow_id, "run_id": "planted", "task": SECRET, "result_json": SECRET}
    more = {"runtime": "managed", "status": "succeeded", "position": 1, "attempt": 1}
    return conn.execute(sa.insert(flow_steps).values({**row, **more, "created_at": at, "updated_at": at}))


def with_dispatch(conn: sa.Connection, flow_id: UUID) -> Any:
    return conn.execute(sa.insert(flow_dispatch).values(run_id="planted", flow_id=flow_id, kind="step", task=SECRET))


def without_drive(conn: sa.Connection, flow_id: UUID) -> Any:
    return conn.execute(sa.delete(flow_dispatch).where(_d.run_id == str(flow_id)))


def with_event_beyond(conn: sa.Connection, flow_id: UUID) -> Any:
    revision = sa.select(_f.revision + 1).where(_f.id == flow_id).scalar_subquery()
    at = sa.select(_f.updated_at).where(_f.id == flow_id).scalar_subquery()
    event = {"flow_id": flow_id, "revision": revision, "kind": "noted", "payload_json": {"set": {}}, "at": at}
    return conn.execute(sa.insert(flow_events).values(event))


def with_revisions_swapped(conn: sa.Connection, flow_id: UUID) -> Any:
    """Of the first two changes of state alone, so that the fold comes to the same."""
    for old, new in ((2, -1), (3, 2), (-1, 3)):
        mine = sa.update(flow_events).where(_e.flow_id == flow_id, _e.revision == old)
        done = conn.execute(mine.values(revision=new))
    return done


# Whose flow it is, what is done to it, and what is found.
DAMAGES: dict[str, tuple[str, Damage, list[str]]] = {
    "a change's event is gone": ("running", without_event("state_updated"), ["gap"]),
    "the first event is gone": ("everything", without_event("created"), ["gap"]),
    "a member's event is gone": ("everything", without_event("step_failed", revised=False), ["step"]),
    "a claim's event is gone": ("everything", without_event("step_started"), ["step_gap"]),
    "a second attempt's claim is gone": ("everything", without_nth_event("flaky", "step_started", 2), ["step_gap"]),
    "a last attempt's claim is gone": ("everything", without_nth_event("flaky", "step_started", 3), ["step_gap"]),
    "a first retry is gone": ("everything", without_nth_event("flaky", "step_retrying", 1), ["step_gap"]),
    "a last retry is gone": ("everything", without_nth_event("flaky", "step_retrying", 2), ["step"]),
    "an open step's claim is gone": ("gathering", changed_row("step", fence=1), ["step_gap"]),
    "a join counts one too many": ("gathering", changed_row("drive", open_members=5), ["join"]),
    "a join counts one too few": ("gathering", changed_row("drive", open_members=3), ["join"]),
    "a join counts who was there before": ("sleeping", changed_row("drive", open_members=1), ["join"]),
    "a member's dispatch row is gone": ("gathering", without_member_row, ["join", "undriven"]),
    "a member's dispatch row came from nowhere": ("gathering", with_dispatch, ["join"]),
    "a closed step's event is gone": ("cancelled", without_event("step_cancelled"), ["step"]),
    "a wait's event is gone": ("sleeping", without_event("waiting"), ["gap", "step_without_events"]),
    "a flow's owner is another": ("everything", changed("owner_session_key", SECRET), ["flow"]),
    "a flow's state is another": ("finished", changed("state_json", {"card": "0000"}), ["flow"]),
    "a flow's result is another": ("everything", changed("result_json", SECRET), ["flow"]),
    "a flow is no longer cancelled": ("saga", changed("cancel_requested", False), ["flow"]),
    "a flow's time is another": ("created", changed("created_at", datetime(2020, 1, 1, tzinfo=UTC)), ["flow"]),
    "a step's result is another": ("everything", changed_step("secret", result_json=f"{SECRET}!"), ["step"]),
    "a step has another outcome": ("everything", changed_step("fails", status="succeeded"), ["step"]),
    "a step is gone": ("everything", without_step, ["step_missing"]),
    "a step came from nowhere": ("everything", with_step, ["step_without_events"]),
    "a step of an ended flow is open": ("everything", changed_step("secret", status="running"), ["open_step", "step"]),
    "an ended flow has work to do": ("everything", with_dispatch, ["dispatch"]),
    "a sleeping flow's drive row is gone": ("sleeping", without_drive, ["undriven"]),
    "a gathering flow's drive row is gone": ("gathering", without_drive, ["undriven"]),
    "a drive row is gone before it was ever claimed": ("unclaimed", without_drive, ["undriven"]),
    "a wait by hand has nobody to settle it": ("waiting", without_drive, ["undriven"]),
    "the row is older than its events": ("created", with_event_beyond, ["beyond"]),
    "two revisions changed places": ("keyed", with_revisions_swapped, ["order"]),
}


@pytest.fixture
def full(bench: Bench, store: SqlFlowStore) -> dict[str, UUID]:
    made = fill(bench)
    for n in range(3):
        FlowManager(store).update_state(made["keyed"], {"n": n})
    return made


def test_each_damage_is_found_by_its_name_and_nothing_else_is(full: dict[str, UUID], store: SqlFlowStore) -> None:
    wrong: dict[str, Any] = {}
    for name, (whose, damage, kinds) in DAMAGES.items():
        with Damaged(store, full[whose], damage) as findings:
            seen = sorted(finding.kind for finding in findings)
            if seen != kinds or {finding.flow_id for finding in findings} != {full[whose]}:
                wrong[name] = (kinds, findings)
    assert wrong == {}
    assert found(store) == []
    named = {kind for _, _, kinds in DAMAGES.values() for kind in kinds}
    assert audit.KINDS.keys() - named == {"untold", "orphan"}, "these have tests of their own"


class Damaged:
    """What is found with this damage done, in a transaction that is rolled back."""

    def __init__(self, store: SqlFlowStore, flow_id: UUID, damage: Damage) -> None:
        self._connection = store.engine.connect()
        self._store, self._flow_id, self._damage = store, flow_id, damage

    def __enter__(self) -> list[Finding]:
        assert self._damage(self._connection, self._flow_id).rowcount != 0
        return found(self._store.using(self._connection))

    def __exit__(self, *_: object) -> None:
        self._connection.rollback()
        self._connection.close()


def test_what_was_written_past_the_manager_is_told_as_that(store: SqlFlowStore, manager: FlowManager) -> None:
    silent, told, own_set = (manager.create_managed(**NAMES) for _ in range(3))
    store.update_with_revision(silent.but(goal=SECRET))
    store.update_and_append(told.but(goal=SECRET), "noted", {"goal": SECRET})
    store.update_and_append(own_set.but(goal=SECRET), "noted", {"set": SECRET, "step": SECRET, "run_id": SECRET})
    findings = found(store)
    assert {(finding.flow_id, finding.kind, finding.about) for finding in findings} == {
        (silent.id, "gap", "2"), (told.id, "untold", "2"), (own_set.id, "untold", "2"),
    }  # fmt: skip
    assert "written past the manager" in str(findings[-1])


@pytest.mark.parametrize(("table", "row"), [
    ("flow_events", {"kind": "noted", "payload_json": {}, "at": datetime(2020, 1, 1, tzinfo=UTC)}),
    ("flow_dispatch", {"run_id": "planted", "kind": "drive"}),
    ("flow_steps", {
        "id": uuid4(), "runtime": "managed", "run_id": "r", "task": "t", "status": "succeeded", "position": 1,
        "attempt": 1, "created_at": datetime(2020, 1, 1, tzinfo=UTC), "updated_at": datetime(2020, 1, 1, tzinfo=UTC),
    }),
])  # fmt: skip
def test_rows_of_flows_that_are_not_there_are_counted(
    store: SqlFlowStore, manager: FlowManager, database_url: str, table: str, row: dict[str, Any]
) -> None:
    flow = manager.create_managed(**NAMES)
    off = "SET session_replication_role = replica" if database_url.startswith("postgresql") else None
    target = {"flow_events": flow_events, "flow_dispatch": flow_dispatch, "flow_steps": flow_steps}[table]
    engine = sa.create_engine(store.engine.url, poolclass=NullPool)  # SQLite keeps foreign keys only if told to
    with engine.begin() as connection:
        if off:
            connection.exec_driver_sql(off)
        connection.execute(sa.insert(target).values({**row, "flow_id": uuid4()}))
    findings = [(finding.flow_id, finding.kind, finding.about) for finding in found(store)]
    some = [found(store, flow_ids=[flow.id]), found(store, limit=5), found(store, since=flow.created_at - LONG)]
    with engine.begin() as connection:
        connection.execute(sa.delete(target))
    assert findings == [(None, "orphan", f"1 in {table}")]
    assert some == [[], [], []], "only who audits everything is told"


# ---- what is looked at ----------------------------------------------------------------------------------------------


def damaged(store: SqlFlowStore, manager: FlowManager) -> Flow:
    """A flow of which an audit says one thing."""
    return store.update_with_revision(manager.create_managed(**NAMES))


def test_only_what_was_asked_for_is_looked_at(store: SqlFlowStore, manager: FlowManager) -> None:
    made = [damaged(store, manager) for _ in range(4)]
    longest_ago = made[1]
    with store.engine.begin() as connection:
        old = sa.update(flows).where(_f.id == longest_ago.id).values(updated_at=datetime(2020, 1, 1, tzinfo=UTC))
        connection.execute(old)

    def ids(**what: Any) -> list[UUID | None]:
        return [finding.flow_id for finding in found(store, **what)]

    newest_first = [flow.id for flow in reversed(made)]
    assert ids() == newest_first
    assert ids(limit=3) == newest_first[:3]
    assert ids(limit=0) == []
    assert ids(since=datetime(2021, 1, 1, tzinfo=UTC)) == [flow for flow in newest_first if flow != longest_ago.id]
    assert ids(since=datetime(2021, 1, 1, tzinfo=UTC), limit=1) == newest_first[:1]
    assert ids(since=datetime(2999, 1, 1, tzinfo=UTC)) == []
    assert ids(flow_ids=[made[2].id, made[0].id]) == [made[2].id, made[0].id]
    assert ids(flow_ids=[]) == []
    nobody = uuid4()
    assert [(f.flow_id, f.kind) for f in found(store, flow_ids=[nobody])] == [(nobody, "orphan")]


def test_pages_of_flows_follow_each_other_without_gap_or_double(
    store: SqlFlowStore, manager: FlowManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "FLOW_PAGE", 3)
    monkeypatch.setattr(op, "EVENT_PAGE", 2)
    made = [damaged(store, manager).id for _ in range(7)]
    for _ in range(4):
        manager.update_state(made[3], {})
    looked_at: list[int] = []
    assert [finding.flow_id for finding in found(store, progress=looked_at.append)] == made[::-1]
    assert looked_at == list(range(1, 8))
    assert [finding.flow_id for finding in found(store, limit=5)] == made[:1:-1]


def test_a_flow_that_is_pruned_between_page_and_look_is_passed_over(store: SqlFlowStore, manager: FlowManager) -> None:
    first, second = damaged(store, manager), damaged(store, manager)
    findings = audit.verify(store)
    assert next(findings).flow_id == second.id
    with store.engine.begin() as connection:
        connection.execute(sa.delete(flows).where(_f.id == first.id))
    assert list(findings) == []


# ---- under load -----------------------------------------------------------------------------------------------------


def test_a_flow_that_changes_all_the_time_is_never_taken_for_torn(store: SqlFlowStore, driving: Driving) -> None:
    """Driven, so that its row, its steps, its events and its dispatch rows all move, and at last are gone."""
    stopped, going = threading.Event(), threading.Event()
    made: list[UUID] = []
    errors: list[BaseException] = []

    def change() -> None:
        try:
            while not stopped.is_set():
                flow, run_ids = driving.gathering(2)
                made.append(flow.id)
                going.set()
                for run_id in run_ids:
                    driving.work(run_id)
                claim = driving.claimed(flow.id)
                driving.end(claim)
        except BaseException as error:
            errors.append(error)
            going.set()

    writer = threading.Thread(target=change)
    writer.start()
    try:
        assert going.wait(10)
        looks, open_seen = 0, 0
        while looks < 150 or len(made) < 10:
            newest = made[-1]
            snapshot = store.run(audit.take_snapshot, newest)
            assert snapshot is not None
            assert list(audit.findings(snapshot)) == []
            open_seen += not snapshot.flow.status.is_terminal
            looks += 1
            assert not errors
    finally:
        stopped.set()
        writer.join(20)
    assert errors == []
    assert open_seen > 0, "it never looked while a flow was being worked on"
    assert found(store) == []


MANY = 50_000
ONE_KILOBYTE = "x" * 1000
PEAK_BYTES = 24 * 1024 * 1024  # all payloads together have more than twice as much


def test_a_flow_with_many_events_is_audited_in_little_memory(store: SqlFlowStore, manager: FlowManager) -> None:
    flow = manager.create_managed(**NAMES)
    with store.engine.begin() as connection:
        numbers = sa.select(sa.literal(2).label("n")).cte("numbers", recursive=True)
        numbers = numbers.union_all(sa.select(numbers.c.n + 1).where(numbers.c.n < MANY))
        told = sa.literal({"set": {"state_json": {"text": ONE_KILOBYTE}}}, _e.payload_json.type)
        at = sa.literal(flow.updated_at, _e.at.type)
        rows = sa.select(sa.literal(flow.id, _e.flow_id.type), numbers.c.n, sa.literal("state_updated"), told, at)
        columns = ["flow_id", "revision", "kind", "payload_json", "at"]
        connection.execute(sa.insert(flow_events).from_select(columns, rows.order_by(numbers.c.n)))
        moved = sa.update(flows).where(_f.id == flow.id).values(revision=MANY, state_json={"text": ONE_KILOBYTE})
        connection.execute(moved)
    tracemalloc.start()
    try:
        findings = found(store, flow_ids=[flow.id])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert findings == []
    assert peak < PEAK_BYTES, f"{peak / 1024**2:.1f} MB"
