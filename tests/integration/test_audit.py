"""The proof by audit: silent over whole histories, and one planted corruption of each kind is found and named."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa

from celery_flows import FlowHandle, Run, StepFailed
from celery_flows.store import audit
from celery_flows.store.operations import writes
from celery_flows.store.tables import flow_dispatch, flow_events, flow_steps, flows
from tests.support.bench import Bench

SECRET = "4111-1111"


def eventful(bench: Bench) -> FlowHandle[Any]:
    """A driven flow with inline and Celery steps, a failed gather, a timer and an event behind it."""

    @bench.task("member")
    def member(number: int) -> int:
        if number == 1:
            raise RuntimeError("one fails")
        return number

    def card() -> str:
        return SECRET

    @bench.flows.flow("eventful")
    def flow(run: Run) -> str:
        number = run.step(card)
        try:
            run.gather(member.s(each) for each in range(3))
        except StepFailed:
            run.step(member, 5)
        run.sleep(timedelta(milliseconds=5))
        run.wait_for("topic", str(run.flow_id))
        return number

    handle = flow.start()
    bench.flows.emit("topic", str(handle.id), {"card": SECRET})
    bench.finish(handle)
    return handle


def found(bench: Bench, **options: Any) -> list[tuple[UUID | None, str]]:
    """What an audit finds, without its words; those must not tell a payload."""
    findings = list(audit.verify(bench.store, **options))
    assert not [finding for finding in findings if SECRET in str(finding)]
    return [(finding.flow_id, finding.kind) for finding in findings]


def tamper(bench: Bench, statement: Any) -> None:
    with bench.store.engine.begin() as connection:
        assert connection.execute(statement).rowcount != 0  # -1: the driver does not say


def event(flow_id: UUID, kind: str) -> Any:
    mine = sa.select(sa.func.min(flow_events.c.id)).where(flow_events.c.flow_id == flow_id, flow_events.c.kind == kind)
    return flow_events.c.id == mine.scalar_subquery()


def step(flow_id: UUID, task: str) -> Any:
    mine = sa.select(sa.func.min(flow_steps.c.run_id)).where(flow_steps.c.flow_id == flow_id, flow_steps.c.task == task)
    return sa.and_(flow_steps.c.flow_id == flow_id, flow_steps.c.run_id == mine.scalar_subquery())


def a_step(flow_id: UUID, status: str) -> dict[str, Any]:
    now = datetime.now(UTC)
    row = {"id": uuid4(), "flow_id": flow_id, "runtime": "managed", "run_id": "planted", "task": "planted"}
    return {**row, "status": status, "position": 1, "attempt": 1, "created_at": now, "updated_at": now}


Corrupt = Callable[[UUID], Any]

CORRUPTIONS: dict[str, tuple[Corrupt, set[str]]] = {
    "an event is deleted": (lambda f: sa.delete(flow_events).where(event(f, "waiting")), {"gap", "step"}),
    "an event without revision is deleted": (
        lambda f: sa.delete(flow_events).where(event(f, "step_failed")),
        {"step"},
    ),
    "a flow's column changes": (lambda f: sa.update(flows).where(flows.c.id == f).values(goal="other"), {"flow"}),
    "a result changes": (
        lambda f: sa.update(flow_steps).where(step(f, "card")).values(result_json="forged"),
        {"step"},
    ),
    "a step is deleted": (lambda f: sa.delete(flow_steps).where(step(f, "card")), {"step_missing"}),
    "a step is added": (lambda f: sa.insert(flow_steps).values(a_step(f, "succeeded")), {"step_without_events"}),
    "a step is opened again": (
        lambda f: sa.update(flow_steps).where(step(f, "card")).values(status="running"),
        {"step", "open_step"},
    ),
    "an ended flow has a dispatch row": (
        lambda f: sa.insert(flow_dispatch).values(run_id="planted", flow_id=f, kind="step"),
        {"dispatch"},
    ),
    "the row's revision falls": (
        lambda f: sa.update(flows).where(flows.c.id == f).values(revision=flows.c.revision - 1),
        {"beyond"},
    ),
}


def test_whole_histories_of_every_kind_are_passed_over_in_silence(bench: Bench) -> None:
    eventful(bench)
    by_hand = bench.flows.manager.create_managed(controller_id="by hand", owner_session_key="me")
    bench.flows.manager.start_running(by_hand.id)
    bench.flows.manager.set_waiting(by_hand.id, {"kind": "manual"})
    bench.flows.manager.pause(by_hand.id)
    bench.flows.manager.request_cancel(by_hand.id)
    looked_at: list[int] = []

    assert found(bench, progress=looked_at.append) == []
    assert looked_at == [1, 2]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_planted_corruption_is_found_and_named(bench: Bench, name: str) -> None:
    handle, untouched = eventful(bench), bench.flows.manager.create_managed(controller_id="x", owner_session_key="me")
    corrupt, kinds = CORRUPTIONS[name]

    tamper(bench, corrupt(handle.id))

    findings = found(bench)
    assert {kind for _, kind in findings} == kinds
    assert {flow_id for flow_id, _ in findings} == {handle.id}
    assert found(bench, flow_ids=[untouched.id]) == []
    bench.store.run(_forget, handle.id)


@writes
def _forget(conn: sa.Connection, flow_id: UUID) -> None:
    conn.execute(sa.delete(flows).where(flows.c.id == flow_id))


def test_a_driven_flow_that_nothing_would_drive_on_is_found(bench: Bench) -> None:
    @bench.flows.flow("sleeps")
    def flow(run: Run) -> None:
        run.sleep(timedelta(days=1))

    handle = flow.start()
    bench.work()
    tamper(bench, sa.delete(flow_dispatch).where(flow_dispatch.c.run_id == str(handle.id)))

    assert found(bench) == [(handle.id, "undriven")]


def test_what_was_written_past_the_manager_is_told_as_that(bench: Bench) -> None:
    store, manager = bench.store, bench.flows.manager
    silent = manager.create_managed(controller_id="silent", owner_session_key="me")
    store.update_with_revision(silent.but(goal="changed"))
    own_words = manager.create_managed(controller_id="own words", owner_session_key="me")
    store.update_and_append(own_words.but(goal="changed"), "changed", {"by": "hand"})

    assert set(found(bench)) == {(silent.id, "gap"), (own_words.id, "untold")}
    for flow in (silent, own_words):
        store.run(_forget, flow.id)


def test_only_what_was_asked_for_is_looked_at(bench: Bench) -> None:
    old, new = (bench.flows.manager.create_managed(controller_id=n, owner_session_key="me") for n in ("old", "new"))
    for flow in (old, new):
        bench.store.update_with_revision(flow.but(goal="changed"))
    tamper(bench, sa.update(flows).where(flows.c.id == old.id).values(updated_at=datetime(2020, 1, 1, tzinfo=UTC)))

    assert found(bench, since=datetime(2021, 1, 1, tzinfo=UTC)) == [(new.id, "gap")]
    assert found(bench, limit=1) == [(new.id, "gap")]
    assert {flow_id for flow_id, _ in found(bench)} == {old.id, new.id}
    missing = uuid4()
    assert found(bench, flow_ids=[missing]) == [(missing, "orphan")]
    for flow in (old, new):
        bench.store.run(_forget, flow.id)


def test_a_flow_that_changes_all_the_time_is_not_taken_for_torn(bench: Bench) -> None:
    manager = bench.flows.manager
    flow = manager.create_managed(controller_id="busy", owner_session_key="me")
    stopped = threading.Event()

    def write() -> None:
        number = 0
        while not stopped.is_set():
            number += 1
            manager.update_state(flow.id, {"n": number})

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen: set[int] = set()
        while len(seen) < 20:
            assert found(bench, flow_ids=[flow.id]) == []
            seen.add(manager.get(flow.id).revision)
    finally:
        stopped.set()
        writer.join()
