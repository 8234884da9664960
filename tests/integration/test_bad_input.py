"""What comes of flows that are written wrongly: each has a defined answer, and costs nobody else anything."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa

from celery_flows import FlowDefinition, FlowFailed, FlowStatus, InvalidData, Run, StepFailed
from celery_flows.store.tables import flows
from celery_flows.tasks.children import DEEPEST
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench


def failure(bench: Bench, definition: FlowDefinition[Any, Any], input: Any = None) -> FlowFailed:
    """What a flow of this definition fails with."""
    with pytest.raises(FlowFailed) as failed:
        bench.finish(definition.start(input))
    return failed.value


def test_a_step_that_returns_what_is_not_json_fails_and_names_itself(bench: Bench) -> None:
    def open_socket() -> object:
        return object()

    @bench.flows.flow("returns an object")
    def returns(run: Run) -> None:
        run.step(open_socket)

    failed = failure(bench, returns)
    assert (failed.type, "open_socket" in failed.message) == ("StepFailed", True)


def test_a_flow_that_acts_between_steps_acts_again_each_time_it_goes_on(bench: Bench) -> None:
    @bench.flows.flow("acts outside")
    def acts(run: Run) -> int:
        bench.effects.append("sent")
        run.sleep(timedelta(milliseconds=20))
        return run.step(len, "abc")

    assert bench.finish(acts.start()) == 3
    assert bench.effects == ["sent", "sent"]


def test_a_flow_that_decides_by_what_it_did_not_record_is_left_alone(bench: Bench) -> None:
    seen: list[int] = []

    @bench.flows.flow("decides outside")
    def decides(run: Run) -> None:
        seen.append(1)
        run.step(len if len(seen) == 1 else repr, "abc")
        run.sleep(timedelta(days=1))

    handle = decides.start()
    bench.work()
    handle.resume()
    bench.work()
    flow = handle.get()
    assert (flow.status, (flow.error_json or {})["type"]) == (FlowStatus.RUNNING, "HistoryMismatch")


def test_a_second_flow_under_a_name_is_refused_where_it_is_defined(bench: Bench) -> None:
    @bench.flows.flow("taken")
    def first(run: Run) -> None: ...

    def second(run: Run) -> None: ...

    with pytest.raises(InvalidData, match=r"'taken' is taken by .*first"):
        bench.flows.flow("taken")(second)
    bench.flows.flow("taken", version=2)(second)


@pytest.mark.parametrize("empty", ["", " "])
@pytest.mark.parametrize("what", ["topic", "correlation_id", "approval"])
def test_a_wait_without_a_name_fails_the_flow_and_names_the_argument(bench: Bench, what: str, empty: str) -> None:
    waits: dict[str, Any] = {
        "topic": lambda run: run.wait_for(empty, "order-1"),
        "correlation_id": lambda run: run.wait_for("paid", empty),
        "approval": lambda run: run.approval(empty),
    }

    @bench.flows.flow("waits for nothing")
    def waits_for_nothing(run: Run) -> None:
        waits[what](run)

    failed = failure(bench, waits_for_nothing)
    assert (failed.type, what in failed.message) == ("InvalidData", True)
    if what == "topic":
        with pytest.raises(InvalidData, match="topic"):
            bench.flows.emit(empty, "order-1")


def test_a_timer_past_the_horizon_fails_the_flow_and_names_the_setting(make_bench: MakeBench) -> None:
    bench = make_bench(timer_horizon_days=30)

    @bench.flows.flow("sleeps too long")
    def sleeps(run: Run, days: int) -> str:
        run.sleep(timedelta(days=days))
        return "awake"

    failed = failure(bench, sleeps, 31)
    assert (failed.type, "flow_timer_horizon_days" in failed.message) == ("InvalidData", True)
    handle = sleeps.start(29)
    bench.work()
    handle.resume()
    assert bench.finish(handle) == "awake"


@pytest.mark.parametrize(
    ("bad", "rule"),
    [(timedelta.max, "goes past the year 9999"), (60, "must be a timedelta")],
    ids=["for ever", "a number"],
)
def test_without_a_horizon_a_timer_may_be_as_long_as_the_calendar(bench: Bench, bad: Any, rule: str) -> None:
    durations: dict[str, Any] = {"long": timedelta(days=300 * 365), "bad": bad}

    @bench.flows.flow("sleeps")
    def sleeps(run: Run, which: str) -> None:
        run.sleep(durations[which])

    @bench.flows.flow("waits")
    def waits(run: Run, which: str) -> None:
        run.wait_for("never", "never", timeout=durations[which])

    for definition, argument in (sleeps, "duration"), (waits, "timeout"):
        handle = definition.start("long")
        bench.work()
        assert handle.status() is FlowStatus.WAITING
        failed = failure(bench, definition, "bad")
        assert (failed.type, failed.message) == ("InvalidData", f"{argument}: {rule}")


@pytest.fixture
def nests(bench: Bench) -> FlowDefinition[int, int]:
    """A flow that is its own child ``depth`` times; below 0: without end."""

    @bench.flows.flow("nests")
    def nests(run: Run, depth: int) -> int:
        return 1 if depth == 0 else 1 + run.flow(nests, depth - 1)

    return nests


def work_down(bench: Bench) -> None:
    """As :meth:`Bench.work`, however many rounds that takes."""
    while todo := bench.claimable():
        for _, run_id in todo:
            bench.drive(UUID(run_id))


def test_child_flows_may_lie_a_hundred_deep(bench: Bench, nests: FlowDefinition[int, int]) -> None:
    handle = nests.start(DEEPEST - 1)
    work_down(bench)
    assert handle.result(0) == DEEPEST


def test_a_flow_that_is_its_own_child_without_end_fails_at_that_depth(
    bench: Bench, nests: FlowDefinition[int, int]
) -> None:
    handle = nests.start(-1)
    work_down(bench)
    with pytest.raises(FlowFailed, match="StepFailed"):
        handle.result(0)
    rows = bench.query(sa.select(flows.c.error_json).order_by(flows.c.created_at, flows.c.id))
    assert len(rows) == DEEPEST
    assert rows[-1].error_json == {
        "type": "InvalidData",
        "message": "child flow nests: lies more than 100 flows deep (… > nests > nests > nests > nests); "
        "end the recursion",
    }


def test_two_flows_that_are_each_others_children_are_bounded_alike(bench: Bench) -> None:
    told: list[str] = []

    @bench.flows.flow("ping")
    def ping(run: Run) -> None:
        run.gather([pong.s()])

    @bench.flows.flow("pong")
    def pong(run: Run) -> None:
        try:
            run.gather([ping.s()])
        except InvalidData as deep:
            told.append(str(deep))

    ping.start()
    work_down(bench)
    assert len(told) == 1
    assert "pong > ping > pong > ping" in told[0]
    assert bench.query(sa.select(sa.func.count()).where(flows.c.status == "finished"))[0][0] == DEEPEST


def test_a_gather_of_nothing_is_an_empty_list_and_a_race_of_nothing_is_refused(bench: Bench) -> None:
    @bench.flows.flow("nobody")
    def nobody(run: Run) -> list[Any]:
        found: list[Any] = [*run.gather([], limit=3), *run.gather(iter(()), return_exceptions=True)]
        try:
            run.first([])
        except InvalidData:
            return [*found, 1]
        return []

    handle = nobody.start()
    assert bench.finish(handle) == [1]
    assert bench.store.list_steps(handle.id) == []


def test_a_step_within_a_step_is_refused_by_both_names(bench: Bench) -> None:
    @bench.flows.flow("nested steps")
    def nested(run: Run) -> None:
        def outer() -> int:
            return run.step(len, "abc")

        try:
            run.step(outer)
        except StepFailed as failed:
            raise ValueError(failed.message) from None

    assert "was taken inside step outer" in failure(bench, nested).message
