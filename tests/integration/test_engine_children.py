"""Flows as steps of flows: results and failures come up, cancelling goes down, whoever dies in between."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa

from celery_flows import (
    FlowCancelled,
    FlowDefinition,
    FlowFailed,
    FlowHandle,
    FlowStatus,
    FlowStepStatus,
    Run,
    StepFailed,
)
from celery_flows.store import CancelPending
from celery_flows.store.engines import make_engine
from celery_flows.store.tables import flow_dispatch, flows
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench
from tests.support.faults import Died, MortalStore, Strikes


class Family:
    """A parent and its children, and what they did."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.effects: list[str] = []

        def note(text: str) -> str:
            self.effects.append(text)
            return text

        @bench.task("noted")
        def noted(text: str) -> str:
            return note(text)

        @bench.flows.flow("child")
        def child(run: Run, name: str) -> str:
            try:
                run.step(note, f"{name} began")
                if name.startswith("bad"):
                    raise ValueError(f"{name} is no good")
                if name.startswith("waiting"):
                    run.wait_for("go on", name)
                return name.upper()
            except FlowCancelled:
                run.step(note, f"{name} undone")
                raise

        @bench.flows.flow("parent")
        def parent(run: Run, names: list[str]) -> list[str]:
            try:
                results = run.gather([child.s(name) for name in names])
                return [run.step(note, "all ended"), *results]
            except FlowCancelled:
                run.step(note, "parent undone")
                raise

        self.child: FlowDefinition[str, str] = child
        self.parent: FlowDefinition[list[str], list[str]] = parent
        self.noted = noted

    def children_of(self, handle: FlowHandle[Any]) -> dict[str, FlowHandle[Any]]:
        """By their inputs."""
        rows = self.bench.query(sa.select(flows.c.id, flows.c.input_json).where(flows.c.parent_flow_id == handle.id))
        return {row.input_json: self.bench.flows.handle(row.id) for row in rows}

    def rows_left(self) -> list[Any]:
        return self.bench.query(sa.select(flow_dispatch))


@pytest.fixture
def family(bench: Bench) -> Family:
    return Family(bench)


def test_a_childs_result_comes_up_and_its_parents_owner_is_its_own(family: Family) -> None:
    bench = family.bench

    @bench.flows.flow("asks")
    def asks(run: Run) -> str:
        return run.flow(family.child, "one")

    handle = asks.start(owner="tenant:acme")
    assert bench.finish(handle) == "ONE"
    one = family.children_of(handle)["one"].get()
    assert (one.parent_flow_id, one.owner_session_key, one.status) == (handle.id, "tenant:acme", FlowStatus.FINISHED)
    [step] = bench.store.list_steps(handle.id)
    assert (step.task, step.child_session_key, step.status) == ("child", str(one.id), FlowStepStatus.SUCCEEDED)
    assert family.rows_left() == []


def test_children_and_celery_steps_go_side_by_side(family: Family) -> None:
    bench = family.bench

    @bench.flows.flow("mixed")
    def mixed(run: Run) -> list[str]:
        return run.gather([family.child.s("one"), family.noted.s("two"), family.child.s("three")])

    handle = mixed.start()
    assert bench.finish(handle) == ["ONE", "two", "THREE"]
    assert sorted(family.effects) == ["one began", "three began", "two"]


def test_a_childs_failure_comes_up_and_can_be_caught(family: Family) -> None:
    bench = family.bench

    @bench.flows.flow("forgives")
    def forgives(run: Run) -> str:
        try:
            return run.flow(family.child, "bad one")
        except StepFailed as failed:
            return f"{failed.step}: {failed.type}: {failed.message}"

    assert bench.finish(forgives.start()) == "child: ValueError: bad one is no good"
    handle = family.parent.start(["bad two"])
    with pytest.raises(FlowFailed, match="bad two is no good"):
        bench.finish(handle)


def test_when_one_child_fails_the_others_are_cancelled_before_anything_follows(family: Family) -> None:
    handle = family.parent.start(["waiting one", "bad two"])
    with pytest.raises(FlowFailed, match="bad two is no good"):
        family.bench.finish(handle)
    assert family.effects.count("waiting one undone") == 1
    assert family.children_of(handle)["waiting one"].status() is FlowStatus.CANCELLED
    assert family.rows_left() == []


def test_cancelling_goes_down_and_the_parent_cleans_up_last(family: Family) -> None:
    bench = family.bench
    handle = family.parent.start(["waiting one", "waiting two"])
    bench.work()
    handle.cancel()
    with pytest.raises(FlowCancelled):
        bench.finish(handle)
    assert sorted(family.effects[:2]) == ["waiting one began", "waiting two began"]
    assert sorted(family.effects[2:4]) == ["waiting one undone", "waiting two undone"]
    assert family.effects[4:] == ["parent undone"]
    assert {child.status() for child in family.children_of(handle).values()} == {FlowStatus.CANCELLED}
    assert family.rows_left() == []


def test_a_child_that_is_cancelled_for_itself_has_failed_for_its_parent(family: Family) -> None:
    bench = family.bench
    handle = family.parent.start(["waiting one"])
    bench.work()
    family.children_of(handle)["waiting one"].cancel()
    with pytest.raises(FlowFailed, match="the flow was cancelled"):
        bench.finish(handle)
    assert "parent undone" not in family.effects


@pytest.mark.parametrize("how", ["cancel", "fail", "finish"])
def test_children_of_a_parent_that_is_ended_by_hand_are_cancelled(family: Family, how: str) -> None:
    bench = family.bench
    handle = family.parent.start(["waiting one", "two"])
    bench.work()
    manager = bench.flows.manager
    {"cancel": manager.cancel, "fail": lambda i: manager.fail(i, "no more"), "finish": manager.finish}[how](handle.id)
    children = family.children_of(handle)
    assert children["waiting one"].status() is FlowStatus.WAITING
    assert [row.kind for row in bench.rows(handle.id)] == []
    assert bench.sweep().settled == 1
    with pytest.raises(FlowCancelled):
        bench.finish(children["waiting one"])
    assert children["two"].status() is FlowStatus.FINISHED
    assert "waiting one undone" in family.effects
    assert family.rows_left() == []


def test_a_child_that_ends_is_seen_to_by_the_sweep_if_its_driver_is_not_there_to(family: Family) -> None:
    bench = family.bench
    handle = family.parent.start(["waiting one"])
    bench.work()
    bench.flows.manager.fail(family.children_of(handle)["waiting one"].id, "no more")
    assert [row.kind for row in bench.rows(handle.id) if row.due_at is not None] == ["child"]
    assert bench.sweep().settled == 1
    with pytest.raises(FlowFailed, match="no more"):
        bench.finish(handle)


def test_a_child_whose_workers_all_died_has_failed(make_bench: MakeBench) -> None:
    bench = make_bench(max_crashes=1)

    def deadly() -> None:
        raise SystemExit

    @bench.flows.flow("deadly child")
    def child(run: Run) -> None:
        run.step(deadly)

    @bench.flows.flow("parent of a deadly child")
    def parent(run: Run) -> str:
        try:
            run.flow(child)
        except StepFailed as failed:
            return failed.type
        return "it lived"

    handle = parent.start()
    bench.drive(handle.id)
    [(_, run_id)] = bench.claimable()
    with pytest.raises(SystemExit):
        bench.drive(UUID(run_id))
    assert bench.sweep().lost == 1
    bench.sweep()
    assert bench.finish(handle) == "DriverLost"


def test_grandchildren_are_cancelled_before_their_parents(family: Family) -> None:
    bench = family.bench

    @bench.flows.flow("grandparent")
    def grandparent(run: Run) -> Any:
        return run.flow(family.parent, ["waiting one"])

    handle = grandparent.start()
    bench.work()
    handle.cancel()
    with pytest.raises(FlowCancelled):
        bench.finish(handle)
    assert family.effects == ["waiting one began", "waiting one undone", "parent undone"]
    assert family.rows_left() == []


def test_input_that_a_child_does_not_take_is_refused_before_anything_is_written(family: Family) -> None:
    bench = family.bench

    @bench.flows.flow("wrong")
    def wrong(run: Run) -> list[str]:
        return run.gather([family.child.s("one"), family.child.s({"not": "text"})])  # type: ignore[arg-type]

    handle = wrong.start()
    with pytest.raises(FlowFailed, match="input"):
        bench.finish(handle)
    assert family.children_of(handle) == {}
    assert family.effects == []


def test_what_is_neither_task_nor_flow_is_refused(family: Family) -> None:
    @family.bench.flows.flow("odd")
    def odd(run: Run) -> Any:
        return run.gather([family.child])  # type: ignore[list-item]

    with pytest.raises(FlowFailed, match=r"gather: takes flow\.s"):
        family.bench.finish(odd.start())


def test_a_cleanup_may_run_a_child(family: Family) -> None:
    bench = family.bench

    @bench.flows.flow("cleans by a child")
    def cleans(run: Run) -> None:
        try:
            run.wait_for("never", "never")
        except FlowCancelled:
            run.flow(family.child, "undo")
            raise

    handle = cleans.start()
    bench.work()
    handle.cancel()
    with pytest.raises(FlowCancelled):
        bench.finish(handle)
    assert family.effects == ["undo began"]
    assert family.children_of(handle)["undo"].status() is FlowStatus.FINISHED


def test_the_parents_records_outlive_the_child(family: Family) -> None:
    """A child that was deleted by hand has failed for its parent; nobody waits for ever."""
    bench = family.bench
    handle = family.parent.start(["waiting one"])
    bench.work()
    child = family.children_of(handle)["waiting one"]
    with bench.store.engine.begin() as connection:
        connection.execute(sa.delete(flows).where(flows.c.id == child.id))
        connection.execute(sa.update(flow_dispatch).where(flow_dispatch.c.kind == "child").values(due_at=sa.func.now()))
    assert bench.sweep().settled == 1
    with pytest.raises(FlowFailed, match="was deleted"):
        bench.finish(handle)


def test_a_death_at_any_call_while_cancelling_leaves_no_child_behind(
    make_bench: MakeBench, engine_database: str
) -> None:
    struck = []
    for at in range(1, 60):
        store = MortalStore(make_engine(engine_database))
        survivor, mortal = Family(make_bench()), Family(make_bench(store=store))
        handle = survivor.parent.start(["waiting one", "two"])
        survivor.bench.work()
        handle.cancel()
        store.strike(at, Strikes.BEFORE)
        try:
            mortal.bench.work()
        except Died:
            struck.append(str(store.struck))
        store.close()
        for _ in range(20):
            survivor.bench.recover()
        assert handle.status() is FlowStatus.CANCELLED
        statuses = {name: child.status() for name, child in survivor.children_of(handle).items()}
        assert statuses == {"waiting one": FlowStatus.CANCELLED, "two": FlowStatus.FINISHED}
        done = mortal.effects + survivor.effects
        assert done.index("waiting one undone") < done.index("parent undone")
        assert survivor.rows_left() == []
        if store.struck is None:
            break
    assert {"claim_drive", "drain", "change_flow", "park", "settle_child", "find_hint"} <= set(struck)
    assert len(struck) > 15


def test_ends_of_parent_and_children_at_once_leave_nothing_behind(family: Family) -> None:
    def fail(flow_id: UUID) -> None:
        with suppress(CancelPending):  # its parent was faster
            bench.flows.manager.fail(flow_id, "no more")

    bench, names = family.bench, [f"waiting {number}" for number in range(4)]
    for _ in range(8):
        handle = family.parent.start(names)
        bench.work()
        children = list(family.children_of(handle).values())
        with ThreadPoolExecutor(8) as pool:
            ends: list[Future[Any]] = [pool.submit(fail, child.id) for child in children]
            ends += [pool.submit(bench.flows.manager.cancel, handle.id)]
            ends += [pool.submit(bench.sweep) for _ in range(3)]
            [each.result(30) for each in ends]
        for _ in range(4):
            bench.recover()
        assert handle.status() is FlowStatus.CANCELLED
        assert {child.status() for child in children} <= {FlowStatus.FAILED, FlowStatus.CANCELLED}
        assert family.rows_left() == []


def test_what_a_parent_was_told_of_a_cancelled_child_does_not_change_when_it_is_cancelled_itself(
    family: Family,
) -> None:
    """Else the replay would take another way, and what was done on the first would never be undone."""
    bench, note = family.bench, family.effects.append

    @bench.flows.flow("goes on alone")
    def alone(run: Run) -> None:
        try:
            run.flow(family.child, "waiting one")
        except StepFailed as failed:
            run.step(note, f"charge, for {failed.type}")
            try:
                run.wait_for("never", "never")
            except FlowCancelled:
                run.step(note, "refund")
                raise

    handle = alone.start()
    bench.work()
    family.children_of(handle)["waiting one"].cancel()
    bench.work()
    assert family.effects[-1] == "charge, for FlowCancelled"
    handle.cancel()
    with pytest.raises(FlowCancelled):
        bench.finish(handle)
    assert family.effects[-2:] == ["charge, for FlowCancelled", "refund"]


def test_a_cleanups_own_child_that_is_cancelled_has_failed(family: Family) -> None:
    bench, note = family.bench, family.effects.append

    @bench.flows.flow("cleans in two ways")
    def cleans(run: Run) -> None:
        try:
            run.wait_for("never", "never")
        except FlowCancelled:
            try:
                run.flow(family.child, "waiting undo")
            except StepFailed:
                run.step(note, "undone otherwise")
            raise

    handle = cleans.start()
    bench.work()
    handle.cancel()
    bench.work()
    family.children_of(handle)["waiting undo"].cancel()
    with pytest.raises(FlowCancelled):
        bench.finish(handle)
    assert family.effects[-1] == "undone otherwise"


def test_a_childs_result_that_the_database_writes_longer_is_not_refused(family: Family) -> None:
    """jsonb writes 1e300 in 301 digits; the limit holds for what the flow returned."""
    bench = family.bench

    @bench.flows.flow("large")
    def large(run: Run) -> list[float]:
        return [1e300] * 20_000

    @bench.flows.flow("asks for the large one")
    def asks(run: Run) -> int:
        return len(run.flow(large))

    assert bench.finish(asks.start()) == 20_000
    with bench.store.engine.begin() as connection:  # the fixture's own audit measures rows again, too
        connection.execute(sa.delete(flows))


def test_children_are_asked_to_cancel_once(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, asked = family.bench, []
    request_cancel = type(bench.flows.manager).request_cancel

    def request(manager: Any, flow_id: UUID, **options: Any) -> Any:
        asked.append(flow_id)
        return request_cancel(manager, flow_id, **options)

    handle = family.parent.start([f"waiting {number}" for number in range(8)])
    bench.work()
    monkeypatch.setattr(type(bench.flows.manager), "request_cancel", request)
    handle.cancel()
    with pytest.raises(FlowCancelled):
        bench.finish(handle)
    assert len(asked) == len(set(asked)) == 9  # the parent, and each child
