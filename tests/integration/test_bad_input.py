"""What comes of flows that are written wrongly: each has a defined answer, and costs nobody else anything."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID

import pytest
import sqlalchemy as sa
from celery import group
from celery.canvas import signature

from celery_flows import (
    Decision,
    Event,
    FlowDefinition,
    FlowFailed,
    FlowStatus,
    InvalidData,
    Run,
    StepFailed,
    Timer,
)
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


async def later() -> int:
    return 1


class Given(NamedTuple):
    child: FlowDefinition[None, None]
    charge: Any


MISUSED: dict[str, tuple[Callable[[Any, Given], Any], str]] = {
    "a result": (lambda run, _: run.step(3), "step: takes a function or a Celery task, not int; give the function"),
    "nothing": (lambda run, _: run.step(None), "step: takes a function or a Celery task, not NoneType"),
    "a coroutine": (lambda run, _: run.step(later()), "step: takes a function or a Celery task, not coroutine"),
    "a definition": (lambda run, given: run.step(given.child), "step: takes no flow; write run.flow(definition, "),
    "a child flow": (lambda run, given: run.step(given.child.s()), "step: takes no flow; write run.flow(definition, "),
    "an event": (lambda run, _: run.step(Event("a", "b")), "step: takes no Event; write run.wait_for"),
    "no function": (lambda run, _: run.transaction(3), "transaction: takes a function, not int; give the function"),
    "a task's transaction": (lambda run, given: run.transaction(given.charge), "transaction: takes a function, not a"),
    "undoing a flow": (lambda run, given: run.on_failure(given.child.s()), "on_failure: takes no flow"),
    "a function as a flow": (lambda run, _: run.flow(len), "flow: takes a definition, which @flows.flow(name) makes"),
    "a member as a flow": (lambda run, given: run.flow(given.child.s()), "flow: takes a definition, which"),
    "a name as a flow": (lambda run, _: run.flow("orders/pay", 1), "flow: takes a definition, which @flows.flow(name)"),
    "one signature": (lambda run, _: run.gather(signature("t")), "gather: must be a list, not Signature"),
    "a group": (lambda run, _: run.gather(group(signature("t"))), "gather: must be a list, not group"),
    "no members": (lambda run, _: run.gather(None), "gather: must be a list, not NoneType"),
    "a bare definition": (lambda run, given: run.gather([given.child]), "gather: takes flow.s(…), not a bare def"),
    "a coroutine among members": (lambda run, _: run.gather([later()]), "gather: takes task.s(…), flow.s(…), Event, "),
    "one event": (lambda run, _: run.first(Event("a", "b")), "first: must be a list, not Event"),
    "one timer": (lambda run, _: run.first(Timer(timedelta(1))), "first: must be a list, not Timer"),
    "a time in words": (lambda run, _: run.sleep_until("2030-01-01"), "at: must be a datetime with a time zone"),
    "a partial of a task": (
        lambda run, given: run.step(partial(partial(given.charge), 1)),
        "step: would run this Celery task here, not on its queue; write task.s(…)",
    ),
    "a partial of a task among members": (
        lambda run, given: run.gather([partial(given.charge, 1)]),
        "gather: would run this Celery task here, not on its queue; write task.s(…)",
    ),
    "a partial of a task that undoes": (
        lambda run, given: run.on_failure(partial(given.charge, 1)),
        "on_failure: would run this Celery task here",
    ),
    "a long approval": (lambda run, _: run.approval("x" * 192), "approval: is 192 characters long; 191 are allowed"),
    "a long decision": (lambda run, _: run.first([Decision("x" * 192)]), "approval: is 192 characters long"),
}  # fmt: skip


def test_what_cannot_be_a_step_is_refused_and_says_what_to_write(bench: Bench) -> None:
    """It would be recorded as a step of a strange name that failed, or do what is not meant."""

    @bench.task("charge")
    def charge(cents: int) -> None:
        bench.effects.append("ran here")

    @bench.flows.flow("child")
    def child(run: Run) -> None: ...

    @bench.flows.flow("misuses")
    def misuses(run: Run, how: str) -> None:
        MISUSED[how][0](run, Given(child, charge))

    handles = {how: misuses.start(how) for how in MISUSED}
    bench.work()
    errors = {how: handle.get().error_json or {} for how, handle in handles.items()}
    told = {
        how: f"{error.get('type')} {error.get('message', '')[: len(MISUSED[how][1])]}" for how, error in errors.items()
    }
    assert told == {how: f"InvalidData {expected}" for how, (_, expected) in MISUSED.items()}
    assert not any(bench.store.list_steps(handle.id) for handle in handles.values())
    assert bench.effects == []


def test_a_topic_may_be_as_long_as_a_name(bench: Bench) -> None:
    topic = "x" * 200

    @bench.flows.flow("waits")
    def waits(run: Run) -> list[Any]:
        return [run.wait_for(topic, "a"), run.first([Event(topic, "a")]).value]

    handle = waits.start()
    bench.work()
    bench.flows.emit(topic, "a", 1)
    bench.work()
    bench.flows.emit(topic, "a", 2)
    assert bench.finish(handle) == [1, 2]
    assert max(len(step.task) for step in bench.store.list_steps(handle.id)) <= 200


def test_what_a_handle_is_given_wrongly_is_refused_by_the_name_it_was_given_under(bench: Bench) -> None:
    @bench.flows.flow("takes a number")
    def takes(run: Run, n: int) -> Any:
        return run.wait_for("never", "comes")

    started = takes.start(1)
    bench.work()
    wrongly: Any = takes
    handle: Any = started
    apps: Any = bench.flows
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: wrongly.start(1, key=5), "key"),
        (lambda: wrongly.start(1, key=""), "key"),
        (lambda: wrongly.start(1, owner=None), "owner"),
        (lambda: wrongly.start_many([1], owner=""), "owner"),
        (lambda: wrongly.start(1, goal=None), "goal"),
        (lambda: wrongly.start(1, eta="tomorrow"), "eta"),
        (lambda: apps.mirror(signature("t"), owner="", key="k"), "owner"),
        (lambda: apps.mirror(signature("t"), key=""), "key"),
        (lambda: apps.handle(5), "flow_id"),
        (lambda: apps.handle(None), "flow_id"),
        (lambda: apps.search(after=handle), "after"),
        (lambda: apps.search(created_after="2030"), "created_after"),
        (lambda: handle.resume([1]), "payload"),
        (lambda: handle.approve("x", by="ann", comment=5), "comment"),
        (lambda: handle.approve("x" * 192, by="ann"), "approval"),
        (lambda: handle.result(timedelta(seconds=1)), "timeout"),
        (lambda: handle.fork(from_step="x", state=[1]), "state"),
    ]
    for call, field in calls:
        with pytest.raises(InvalidData) as refused:
            call()
        assert refused.value.field == field
    assert started.status() is FlowStatus.WAITING


def test_a_key_of_the_state_may_be_called_self(bench: Bench) -> None:
    @bench.flows.flow("updates")
    def updates(run: Run) -> None:
        run.update(**{"self": 1})

    handle = updates.start()
    bench.finish(handle)
    assert handle.state() == {"self": 1}


def test_the_default_of_an_input_is_taken_where_none_is_given_and_kept(bench: Bench) -> None:
    """Kept, so that another default in a later version of the code is not taken by flows that have begun."""

    @bench.flows.flow("child")
    def child(run: Run, n: int | None = 5) -> int | None:
        return n

    @bench.flows.flow("parent")
    def parent(run: Run, which: str = "all") -> list[Any]:
        return [which, run.flow(child), run.flow(child, 0), *run.gather([child.s(), child.s(1)])]

    handle = parent.start(key="k")
    assert handle.get().input_json == "all"
    assert parent.start("all", key="k").id == handle.id
    assert bench.finish(handle) == ["all", 5, 0, 5, 1]
    assert [bench.finish(each) for each in child.start_many([None, 2])] == [5, 2]
