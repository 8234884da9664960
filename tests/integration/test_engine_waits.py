"""Timers and external events: no worker is held, nothing is handed over twice, and first come is first served."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from celery_flows import FlowStatus, InvalidData, Run, WaitTimedOut
from celery_flows.store.tables import flow_dispatch, flow_inbox
from celery_flows.tasks import driver as driving
from celery_flows.tasks.emit import hand_over
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench
from tests.support.fold import assert_whole
from tests.support.waiting import until

SHORT = timedelta(milliseconds=30)
NAP = timedelta(milliseconds=500)  # long enough to be asleep for, on a busy machine too


def waiting_flow(bench: Bench, timeout: timedelta | None = None) -> Any:
    """A flow that waits for one event, or says that it timed out."""

    @bench.flows.flow("waits")
    def waits(run: Run, correlation_id: str) -> Any:
        try:
            return run.wait_for("approval", correlation_id, timeout=timeout)
        except WaitTimedOut as timed_out:
            return f"no {timed_out.topic} for {timed_out.correlation_id}"

    return waits


def looks(bench: Bench) -> list[Any]:
    """The events that somebody has yet to look at."""
    return bench.query(sa.select(flow_dispatch).where(flow_dispatch.c.kind == "look"))


# ---- timers ---------------------------------------------------------------------------------------------------------


def test_a_sleeping_flow_holds_no_worker_and_no_message(bench: Bench) -> None:
    @bench.flows.flow("sleeps")
    def sleeps(run: Run) -> str:
        run.sleep(timedelta(days=400))
        return "rested"

    handle = sleeps.start()
    bench.work()
    [row] = bench.rows(handle.id)
    assert (row.worker, row.publish_count) == (None, 0)
    assert row.due_at - datetime.now(UTC) > timedelta(days=399)
    flow = handle.get()
    assert flow.status is FlowStatus.WAITING
    assert flow.wait_json is not None
    assert flow.wait_json["kind"] == "timer"
    bench.messages()
    bench.drive(handle.id)  # a late message comes before its time
    assert handle.status() is FlowStatus.WAITING
    assert bench.sweep().published == 0


def test_a_timer_is_kept_when_the_flow_is_called_before_its_time(bench: Bench) -> None:
    @bench.flows.flow("sleeps")
    def sleeps(run: Run) -> str:
        run.sleep(timedelta(days=1))
        return "rested"

    handle = sleeps.start()
    bench.work()
    before = handle.get().wait_json
    bench.call_driver(handle.id)
    bench.work()
    assert handle.get().wait_json == before
    [row] = bench.rows(handle.id)
    assert row.due_at == datetime.fromisoformat((before or {})["at"])


def test_the_sweep_finds_a_timer_that_is_due(bench: Bench) -> None:
    @bench.flows.flow("naps")
    def naps(run: Run) -> str:
        run.sleep(NAP)
        return "rested"

    handle = naps.start()
    bench.drive(handle.id)
    bench.messages()
    until(lambda: bench.sweep().published, "the timer is found due")
    assert [message.id for message in bench.messages()] == [str(handle.id)]
    bench.drive(handle.id)
    assert handle.result(0) == "rested"


def test_a_time_that_has_passed_is_no_wait(bench: Bench) -> None:
    @bench.flows.flow("late")
    def late(run: Run) -> str:
        run.sleep_until(datetime(2001, 1, 1, tzinfo=UTC))
        run.sleep(timedelta(seconds=-5))
        return "at once"

    handle = late.start()
    bench.drive(handle.id)
    assert handle.result(0) == "at once"
    assert "waiting" not in bench.kinds(handle.id)


def test_naive_times_and_times_past_the_horizon_are_refused(make_bench: MakeBench) -> None:
    bench = make_bench(timer_horizon_days=30)

    @bench.flows.flow("bad times")
    def bad_times(run: Run, topic: str) -> list[str]:
        said = []
        for wait in (
            lambda: run.sleep_until(datetime(2030, 1, 1)),  # noqa: DTZ001
            lambda: run.sleep(timedelta(days=31)),
            lambda: run.wait_for("approval", "x", timeout=timedelta(days=31)),
            lambda: run.wait_for("", "x"),
            lambda: run.wait_for("approval", "x" * 1000),
        ):
            try:
                wait()
            except InvalidData as refused:
                said.append(refused.field)
        return said

    handle = bad_times.start("x")
    assert bench.finish(handle) == ["at", "timer", "timer", "topic", "correlation_id"]
    assert bench.store.list_steps(handle.id) == []


# ---- external events ------------------------------------------------------------------------------------------------


def test_an_event_before_its_wait_is_kept(bench: Bench) -> None:
    flow = waiting_flow(bench)
    bench.flows.emit("approval", "o-1", {"granted": True})
    assert looks(bench) == []  # the next waiter looks for itself
    assert bench.finish(flow.start("o-1")) == {"granted": True}


def test_an_event_resumes_the_flow_that_waits_for_it(bench: Bench) -> None:
    flow = waiting_flow(bench)
    handle, other = flow.start("o-1"), flow.start("o-2")
    bench.work()
    bench.messages()
    bench.flows.emit("approval", "o-1", {"granted": True})
    assert [message.id for message in bench.messages()] == [str(handle.id)]
    bench.work()
    assert handle.result(0) == {"granted": True}
    assert other.status() is FlowStatus.WAITING


def test_an_event_between_the_wait_and_its_look_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emitter commits, looks and finds nobody waiting, all before the driver's own look."""
    flow = waiting_flow(bench)
    handle = flow.start("o-1")
    looked = hand_over

    def emit_first(*args: Any, **kwargs: Any) -> int:
        monkeypatch.setattr(driving, "hand_over", looked)
        bench.flows.emit("approval", "o-1", "just in time")
        return looked(*args, **kwargs)

    monkeypatch.setattr(driving, "hand_over", emit_first)
    bench.work()
    assert handle.result(0) == "just in time"


def test_an_event_between_look_and_park_calls_the_driver_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = waiting_flow(bench)
    handle = flow.start("o-1")
    looked = hand_over

    def emit_after(*args: Any, **kwargs: Any) -> int:
        monkeypatch.setattr(driving, "hand_over", looked)
        moved = looked(*args, **kwargs)
        bench.flows.emit("approval", "o-1", "just too late")
        return moved

    monkeypatch.setattr(driving, "hand_over", emit_after)
    bench.drive(handle.id)  # one message is enough
    assert handle.result(0) == "just too late"


def test_one_event_resumes_one_flow_the_one_that_has_waited_longest(bench: Bench) -> None:
    flow = waiting_flow(bench)
    first, second = flow.start("o-1"), flow.start("o-1")
    for handle in (first, second):
        bench.drive(handle.id)
    bench.flows.emit("approval", "o-1", 1)
    bench.work()
    assert first.result(0) == 1
    assert second.status() is FlowStatus.WAITING
    bench.flows.emit("approval", "o-1", 2)
    bench.work()
    assert second.result(0) == 2


@pytest.mark.parametrize("how", ["called", "paused", "paused and unpaused", "told of progress"])
def test_a_waiter_that_is_woken_keeps_its_place(bench: Bench, how: str) -> None:
    waits = waiting_flow(bench)
    first, second = waits.start("order-1"), waits.start("order-1")
    for handle in first, second:
        bench.drive(handle.id)
    if how == "called":
        bench.call_driver(first.id)
    elif how == "told of progress":
        bench.flows.manager.update_state(first.id, {"seen": True})
    else:
        first.pause()
    if how == "paused and unpaused":
        first.unpause()
    bench.work()
    bench.flows.emit("approval", "order-1", "granted")
    assert (first.get().wait_json is None, second.get().wait_json is None) == (True, False)
    if how == "paused":
        first.unpause()
    assert bench.finish(first) == "granted"


@pytest.mark.parametrize("what", ["sleep", "wait_for paid", "approval refund"])
def test_a_flow_that_waits_tells_by_its_current_step_what_for(bench: Bench, what: str) -> None:
    waits: dict[str, Any] = {
        "sleep": lambda run: run.sleep(timedelta(days=1)),
        "wait_for paid": lambda run: run.wait_for("paid", "order-1"),
        "approval refund": lambda run: run.approval("refund"),
    }

    @bench.flows.flow("waits after a step")
    def waits_after_a_step(run: Run) -> None:
        run.step(abs, 1)
        waits[what](run)

    handle = waits_after_a_step.start()
    bench.work()
    assert (handle.status(), handle.get().current_step) == (FlowStatus.WAITING, what)
    assert_whole(bench.store, handle.id)


def test_events_are_handed_over_first_in_first_out(bench: Bench) -> None:
    @bench.flows.flow("collects")
    def collects(run: Run) -> list[int]:
        return [run.wait_for("n", "x") for _ in range(4)]

    for number in (1, 2):
        bench.flows.emit("n", "x", number)
    handle = collects.start()
    bench.work()
    for number in (3, 4):
        bench.flows.emit("n", "x", number)
    assert bench.finish(handle) == [1, 2, 3, 4]
    assert bench.kinds(handle.id).count("resumed") >= 4


def test_topic_and_correlation_id_are_not_run_together(bench: Bench) -> None:
    flow = waiting_flow(bench)
    handle = flow.start("b:c")
    bench.work()
    bench.flows.emit("approval:b", "c", "wrong")
    bench.work()
    assert handle.status() is FlowStatus.WAITING


def test_a_wait_times_out_alike_live_and_replayed(bench: Bench) -> None:
    @bench.flows.flow("gives up")
    def gives_up(run: Run) -> list[str]:
        said = []
        for _ in range(2):
            try:
                run.wait_for("approval", "o-1", timeout=SHORT)
            except WaitTimedOut as timed_out:
                said.append(str(timed_out))
        return said

    assert bench.finish(gives_up.start()) == ["no event 'approval' for 'o-1' came in time"] * 2


def test_an_event_after_the_timeout_is_kept_for_the_next(bench: Bench) -> None:
    flow = waiting_flow(bench, SHORT)
    assert bench.finish(flow.start("o-1")) == "no approval for o-1"
    bench.flows.emit("approval", "o-1", "late")
    assert bench.finish(flow.start("o-1")) == "late"


def test_an_event_that_is_there_beats_the_timeout_at_the_last_look(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is up, but the event committed before the timeout was taken: the event is not lost to a timeout."""
    handle = waiting_flow(bench, SHORT).start("o-1")
    taking = driving.Driver._take_timeout

    def emit_first(driver: Any, step: Any) -> bool:
        bench.flows.emit("approval", "o-1", "in time")
        return taking(driver, step)

    monkeypatch.setattr(driving.Driver, "_take_timeout", emit_first)
    assert bench.finish(handle) == "in time"


def test_an_event_whose_emitter_died_is_handed_over_by_the_sweep(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = waiting_flow(bench)
    handle = flow.start("o-1")
    bench.work()
    with bench.store.engine.connect() as connection:
        bench.flows.emit("approval", "o-1", "from the grave", session=connection)
        monkeypatch.setattr("celery_flows.tasks.emit.look", lambda *_: None)  # the emitter dies after its commit
        connection.commit()
    monkeypatch.undo()
    assert len(looks(bench)) == 1
    assert handle.status() is FlowStatus.WAITING
    bench.pass_time()
    assert bench.sweep().handed_over == 1
    assert looks(bench) == []
    assert bench.finish(handle) == "from the grave"


# ---- in a caller's transaction --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["connection", "session"])
def test_an_event_in_a_callers_transaction_is_handed_over_after_the_commit(bench: Bench, kind: str) -> None:
    flow = waiting_flow(bench)
    handle = flow.start("o-1")
    bench.work()
    opened = bench.store.engine.connect() if kind == "connection" else Session(bench.store.engine)
    with opened as transaction:
        bench.flows.emit("approval", "o-1", "committed", session=transaction)
        transaction.commit()
    if kind == "connection":  # it lets nobody use the database right after its commit: the sweep hands over
        assert bench.sweep().handed_over == 1
    assert handle.status() is FlowStatus.RUNNING
    assert bench.finish(handle) == "committed"


@pytest.mark.parametrize("kind", ["connection", "session"])
def test_an_event_in_a_transaction_that_rolls_back_never_was(bench: Bench, kind: str) -> None:
    flow = waiting_flow(bench)
    handle = flow.start("o-1")
    bench.work()
    opened = bench.store.engine.connect() if kind == "connection" else Session(bench.store.engine)
    with opened as transaction:
        bench.flows.emit("approval", "o-1", "never", session=transaction)
        transaction.rollback()
    assert bench.query(sa.select(flow_inbox)) == []
    assert looks(bench) == []
    bench.pass_time()
    bench.sweep()
    assert handle.status() is FlowStatus.WAITING


def test_events_that_cannot_be_stored_are_refused_before_anything_is_written(bench: Bench) -> None:
    for topic, correlation_id, payload in [
        ("", "x", 1),
        ("t", "", 1),
        ("t", "x", {1}),
        ("t", "x", "\0"),
        ("t", "x", b""),
    ]:
        with pytest.raises(InvalidData):
            bench.flows.emit(topic, correlation_id, payload)
    assert bench.query(sa.select(flow_inbox)) == []


# ---- pausing --------------------------------------------------------------------------------------------------------


def test_a_paused_flow_is_not_driven_and_goes_on_afterwards(bench: Bench) -> None:
    @bench.flows.flow("plain")
    def plain(run: Run) -> int:
        return run.step(int, 3)

    handle = plain.start()
    bench.flows.manager.pause(handle.id)
    bench.drive(handle.id)
    assert handle.status() is FlowStatus.CREATED
    bench.flows.manager.unpause(handle.id)
    bench.sweep()
    assert bench.finish(handle) == 3


def test_a_flow_paused_while_it_runs_stops_before_its_next_step(bench: Bench) -> None:
    def pausing(flow_id: str) -> None:
        bench.flows.manager.pause(UUID(flow_id))

    @bench.flows.flow("paused midway")
    def paused(run: Run) -> int:
        run.step(pausing, str(run.flow_id))
        return run.step(int, 3)

    handle = paused.start()
    bench.drive(handle.id)
    assert [step.task for step in bench.store.list_steps(handle.id)] == ["pausing"]
    assert bench.rows(handle.id)[0].worker is None
    bench.flows.manager.unpause(handle.id)
    assert bench.finish(handle) == 3


def test_a_timer_that_ended_during_a_pause_fires_when_it_is_over(bench: Bench) -> None:
    """Unpausing calls the driver: the sweep, whose looks became rarer meanwhile, is not waited for."""

    @bench.flows.flow("naps")
    def naps(run: Run) -> str:
        run.sleep(NAP)
        return "rested"

    handle = naps.start()
    bench.drive(handle.id)
    bench.flows.manager.pause(handle.id)
    until(lambda: bench.sweep().published, "the timer is found due")
    bench.drive(handle.id)
    assert handle.status() is FlowStatus.WAITING
    bench.messages()
    bench.flows.manager.unpause(handle.id)
    assert bench.sweep().published == 1
    assert bench.finish(handle) == "rested"


def test_an_event_reaches_a_paused_flow_when_the_pause_is_over(bench: Bench) -> None:
    flow = waiting_flow(bench)
    handle = flow.start("o-1")
    bench.work()
    bench.flows.manager.pause(handle.id)
    bench.flows.emit("approval", "o-1", "held back")
    bench.drive(handle.id)
    assert not handle.status().is_terminal
    bench.flows.manager.unpause(handle.id)
    assert bench.finish(handle) == "held back"
