"""The first of several: events, decisions and times beside tasks and flows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa

from celery_flows import (
    Approval,
    AsyncRun,
    Decision,
    Event,
    FlowCancelled,
    FlowFailed,
    FlowStatus,
    InvalidData,
    Retry,
    Run,
    StepFailed,
    Timer,
)
from celery_flows.store.tables import flow_dispatch, flow_inbox, flows
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench

HOUR, MOMENT = timedelta(hours=1), timedelta(milliseconds=1)


def children(bench: Bench, flow_id: UUID) -> list[str]:
    """The statuses of the flows that wait for this one."""
    mine = sa.select(flows.c.status).where(flows.c.parent_flow_id == flow_id).order_by(flows.c.id)
    return [str(status) for (status,) in bench.query(mine)]


def unclaimed(bench: Bench) -> list[Any]:
    """The payloads of events that nobody has waited for."""
    kept = sa.select(flow_inbox.c.payload_json).where(flow_inbox.c.consumed_by.is_(None))
    return [payload for (payload,) in bench.query(kept.order_by(flow_inbox.c.position))]


def settle(bench: Bench) -> None:
    """Has all done that is due."""
    bench.sweep()
    bench.work()


def test_the_first_of_an_event_and_a_time(bench: Bench) -> None:
    @bench.flows.flow("waits")
    def waits(run: Run, seconds: float) -> list[Any]:
        return list(run.first([Event("paid", "o1"), Timer(timedelta(seconds=seconds))]))

    paid = waits.start(3600)
    bench.work()
    assert children(bench, paid.id) == ["waiting", "waiting"]
    bench.flows.emit("paid", "o1", {"cents": 5})
    settle(bench)
    assert paid.result(0) == [0, {"cents": 5}]
    late = waits.start(0.2)
    assert bench.finish(late) == [1, None]
    settle(bench)
    assert children(bench, paid.id) == ["finished", "cancelled"]
    assert children(bench, late.id) == ["cancelled", "finished"]


def test_an_event_that_came_before_is_first_at_once(bench: Bench) -> None:
    @bench.flows.flow("waits")
    def waits(run: Run) -> list[Any]:
        return list(run.first([Timer(HOUR), Event("paid", "o1")]))

    bench.flows.emit("paid", "o1", "early")
    assert bench.finish(waits.start()) == [1, "early"]


def test_an_event_beside_tasks(bench: Bench) -> None:
    @bench.task("slow")
    def slow() -> str:
        return "done"

    @bench.flows.flow("waits")
    def waits(run: Run) -> list[Any]:
        return list(run.first([slow.s(), Event("stop", "here")]))

    handle = waits.start()
    bench.drive(handle.id)
    bench.flows.emit("stop", "here", "stopped")
    for kind, run_id in bench.claimable():
        if kind == "drive":
            bench.drive(UUID(run_id))
    bench.drive(handle.id)
    assert handle.result(0) == [1, "stopped"]
    settle(bench)
    assert bench.effects == []


def test_an_event_that_came_second_is_given_back(bench: Bench) -> None:
    """Both events are there before the flow is asked: one is taken, and whoever waits for the other next has it."""

    @bench.flows.flow("waits")
    def waits(run: Run) -> list[Any]:
        which, value = run.first([Event("a", "1"), Event("b", "1")])
        other = "ba"[which]
        return [value, run.wait_for(other, "1")]

    bench.flows.emit("a", "1", "of a")
    bench.flows.emit("b", "1", "of b")
    handle = waits.start()
    taken: list[Any] = bench.finish(handle)
    assert sorted(taken) == ["of a", "of b"]
    settle(bench)
    assert unclaimed(bench) == []


def test_an_event_that_a_loser_got_before_its_cancel_is_given_back(bench: Bench) -> None:
    """The loser holds the event, and has not ended when it is asked to cancel."""

    @bench.flows.flow("waits")
    def waits(run: Run) -> Any:
        return run.first([Event("a", "1"), Event("b", "1")]).value

    handle = waits.start()
    bench.drive(handle.id)
    first, second = [UUID(run_id) for kind, run_id in bench.claimable() if kind == "drive"]
    bench.drive(first)
    bench.drive(second)
    bench.flows.emit("b", "1", "of b")  # its flow is resumed, and nobody has driven it yet
    bench.flows.emit("a", "1", "of a")
    bench.drive(first)
    bench.drive(handle.id)
    assert handle.result(0) == "of a"
    settle(bench)
    assert children(bench, handle.id) == ["finished", "cancelled"]
    assert unclaimed(bench) == ["of b"]


def test_an_event_is_given_back_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver dies after it gave the event back, before that is recorded."""

    class Died(BaseException):
        pass

    @bench.flows.flow("waits")
    def waits(run: Run) -> Any:
        return run.first([Event("a", "1"), Event("b", "1")]).value

    bench.flows.emit("a", "1", "of a")
    bench.flows.emit("b", "1", "of b")
    handle = waits.start()
    bench.drive(handle.id)
    for kind, run_id in bench.claimable():
        if kind == "drive" and UUID(run_id) != handle.id:
            bench.drive(UUID(run_id))
    struck: list[Any] = []
    recording = bench.store.change

    def die_before(change: Any, **options: Any) -> Any:
        if change.step is not None and change.step.task == "first.end_others" and not struck:
            struck.append(unclaimed(bench))
            raise Died
        return recording(change, **options)

    monkeypatch.setattr(bench.store, "change", die_before)
    with pytest.raises(Died):
        bench.drive(handle.id)
    bench.recover()
    settle(bench)
    assert struck == [unclaimed(bench)]
    assert len(unclaimed(bench)) == 1
    assert {handle.result(0), *unclaimed(bench)} == {"of a", "of b"}


def test_the_first_of_two_decisions(bench: Bench) -> None:
    @bench.flows.flow("asks")
    def asks(run: Run) -> str:
        which, approval = run.first([Decision("manager"), Decision("finance"), Timer(HOUR)])
        assert isinstance(approval, Approval)
        return f"{which} {approval.by} {approval.granted}"

    handle = asks.start()
    bench.work()
    handle.reject("finance", by="Ada")
    settle(bench)
    assert handle.result(0) == "1 Ada False"


def test_all_of_several_events(bench: Bench) -> None:
    @bench.flows.flow("gathers")
    def gathers(run: Run) -> list[Any]:
        return run.gather([Event("part", str(number)) for number in range(3)])

    handle = gathers.start()
    bench.work()
    for number in (2, 0, 1):
        bench.flows.emit("part", str(number), number)
        settle(bench)
    assert handle.result(0) == [0, 1, 2]


def test_waiting_flows_run_on_the_queue_of_the_flow(bench: Bench) -> None:
    """Its workers know the code; the default queue may have none."""

    @bench.flows.flow("waits", queue="orders")
    def waits(run: Run) -> Any:
        return run.first([Event("paid", "o1"), Timer(HOUR)]).value

    handle = waits.start()
    bench.drive(handle.id)
    queues = bench.query(sa.select(flow_dispatch.c.queue).where(flow_dispatch.c.kind == "drive"))
    assert [queue for (queue,) in queues] == ["orders"] * 3
    bench.flows.emit("paid", "o1", "yes")
    assert bench.finish(handle) == "yes"


def test_a_cancel_goes_down_to_what_is_waited_for(bench: Bench) -> None:
    @bench.flows.flow("waits")
    def waits(run: Run) -> Any:
        return run.first([Event("paid", "o1"), Timer(HOUR)]).value

    handle = waits.start()
    bench.work()
    handle.cancel()
    settle(bench)
    with pytest.raises(FlowCancelled):
        handle.result(0)
    assert children(bench, handle.id) == ["cancelled", "cancelled"]
    bench.flows.emit("paid", "o1", "too late")
    settle(bench)
    assert unclaimed(bench) == ["too late"]


def test_nothing_is_waited_for_while_cleaning_up(bench: Bench) -> None:
    @bench.flows.flow("waits")
    def waits(run: Run) -> Any:
        try:
            run.sleep(HOUR)
        except FlowCancelled:
            run.first([Event("paid", "o1"), Timer(HOUR)])

    handle = waits.start()
    bench.work()
    handle.cancel()
    settle(bench)
    assert handle.status() is FlowStatus.CANCELLED
    assert children(bench, handle.id) == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: Event("", "o1"), "topic"),
        (lambda: Event("paid", ""), "correlation_id"),
        (lambda: Decision(""), "approval"),
        (lambda: Timer(timedelta(0)), "timer"),
        (lambda: Timer(datetime(2030, 1, 1)), "timer"),  # noqa: DTZ001 - naive is what is refused
    ],
)
def test_what_cannot_be_waited_for_is_refused(wrong: Any, says: str) -> None:
    with pytest.raises(InvalidData, match=says):
        wrong()


def test_a_timer_past_the_horizon_is_refused(make_bench: MakeBench) -> None:
    bench = make_bench(timer_horizon_days=10)

    @bench.flows.flow("waits")
    def waits(run: Run) -> Any:
        return run.first([Event("paid", "o1"), Timer(datetime.now(UTC) + timedelta(days=11))]).value

    with pytest.raises(FlowFailed, match="more than 10 days away"):
        bench.finish(waits.start())


def test_options_hold_for_what_is_waited_for_as_for_child_flows(bench: Bench) -> None:
    @bench.flows.flow("in time")
    def in_time(run: Run) -> str:
        try:
            run.options(timeout=timedelta(milliseconds=200)).gather([Event("paid", "o1")])
        except StepFailed as failed:
            return failed.type
        return ""

    @bench.flows.flow("again")
    def again(run: Run) -> Any:
        return run.options(retry=Retry(max_attempts=2)).first([Event("paid", "o1"), Timer(HOUR)]).value

    assert bench.finish(in_time.start()) == "FlowTimedOut"
    with pytest.raises(FlowFailed, match="retry: is not of child flows"):
        bench.finish(again.start())


# ---- members by name ------------------------------------------------------------------------------------------------


def test_a_member_that_was_given_by_name_is_told_by_name(bench: Bench) -> None:
    @bench.flows.flow("asks")
    def asks(run: Run, seconds: float) -> str:
        first = run.first(manager=Decision("manager"), late=Timer(timedelta(seconds=seconds)))
        return "late" if first.which == "late" else f"{first.which}: {first.value.by}"

    handle = asks.start(3600)
    bench.work()
    handle.approve("manager", by="Ada")
    settle(bench)
    assert handle.result(0) == "manager: Ada"
    assert bench.finish(asks.start(0.1)) == "late"


def test_tasks_and_flows_have_names_too(bench: Bench) -> None:
    @bench.task("halve")
    def halve(number: int) -> int:
        if number % 2:
            raise ValueError("odd")
        return number // 2

    @bench.flows.flow("child")
    def child(run: Run) -> str:
        return str(run.wait_for("go", "on"))

    @bench.flows.flow("races")
    def races(run: Run) -> list[Any]:
        return list(run.first(odd=halve.s(1), child=child.s(), even=halve.s(4)))

    assert bench.finish(races.start()) == ["even", 2]


def test_an_async_flow_names_its_members(bench: Bench) -> None:
    @bench.flows.flow("waits")
    async def waits(run: AsyncRun) -> list[Any]:
        return list(await run.first(paid=Event("paid", "o1"), late=Timer(HOUR)))

    bench.flows.emit("paid", "o1", 5)
    assert bench.finish(waits.start()) == ["paid", 5]


def test_each_round_of_a_loop_may_have_the_same_names(bench: Bench) -> None:
    @bench.flows.flow("loops")
    def loops(run: Run) -> list[Any]:
        return [run.first(paid=Event("paid", "o1"), late=Timer(HOUR)).value for _ in range(3)]

    for number in range(3):
        bench.flows.emit("paid", "o1", number)
    assert bench.finish(loops.start()) == [0, 1, 2]


def asking(bench: Bench, names: list[str]) -> Any:
    """A flow that asks by these names, in this order, twice; as a release of its code would have it."""
    bench.runtime.registry._definitions.pop("asks", None)

    @bench.flows.flow("asks")
    def asks(run: Run) -> list[str]:
        return [run.first(**{name: Decision(name) for name in names}).which for _ in range(2)]

    return asks


def test_members_by_name_may_change_places(bench: Bench) -> None:
    """The order of keyword arguments looks as if it made no difference, so it must make none: neither who is who while
    they are waited for, nor who was first."""
    handle = asking(bench, ["manager", "finance"]).start()
    bench.work()
    asking(bench, ["finance", "manager"])
    handle.approve("manager", by="Ada")
    settle(bench)
    asking(bench, ["manager", "finance"])
    handle.approve("finance", by="Bob")
    settle(bench)
    assert handle.result(0) == ["manager", "finance"]


@pytest.mark.parametrize("renamed", ["while it is waited for", "when it was first"])
@pytest.mark.parametrize("names", [["boss", "finance"], ["finance", "boss"]])
def test_a_name_that_changes_under_a_flow_is_refused(bench: Bench, names: list[str], renamed: str) -> None:
    """It would be another member, and the one there was would take its decision."""
    handle = asking(bench, ["manager", "finance"]).start()
    bench.work()
    if renamed == "when it was first":
        handle.approve("manager", by="Ada")
        settle(bench)
    asking(bench, names)
    handle.approve("finance", by="Bob")
    settle(bench)
    error = handle.get().error_json or {}
    assert error["type"] == "HistoryMismatch"
    assert f"'flows.event (manager)', but the flow function came to 'flows.event ({names[0]})'" in error["message"]
    asking(bench, ["manager", "finance"])
    bench.pass_time()
    bench.work()
    if renamed == "while it is waited for":
        handle.approve("manager", by="Ada")
        settle(bench)
    assert sorted(handle.result(0)) == ["finance", "manager"]


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (lambda run: run.first([Timer(HOUR)], late=Timer(HOUR)), "first: takes its members in a list, or by name"),
        (lambda run: run.first(), "first: takes one or more of"),
        (lambda run: run.first(**{"": Timer(HOUR)}), "name of a member: must not be empty"),
        (lambda run: run.first(late=lambda: 1), "first: takes one or more of"),
        (lambda run: run.options(key="k").first(late=Timer(HOUR)), "step key: is not of members that have names"),
    ],
)
def test_what_cannot_be_first_is_refused(bench: Bench, first: Any, says: str) -> None:
    @bench.flows.flow("wrong")
    def wrong(run: Run) -> None:
        first(run)

    with pytest.raises(FlowFailed, match=says):
        bench.finish(wrong.start())


def test_a_member_may_have_any_name(bench: Bench) -> None:
    @bench.flows.flow("named")
    def named(run: Run) -> list[str]:
        return [run.first(members=Timer(MOMENT)).which, run.first(self=Timer(MOMENT)).which]

    assert bench.finish(named.start()) == ["members", "self"]
