"""Whoever was overtaken changes nothing, whatever the flow function catches; doubled and malformed messages neither."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from celery_flows import FlowStatus, FlowStepStatus, Run
from celery_flows.store import clock
from celery_flows.tasks import claimed, driver, lease
from celery_flows.tasks.emit import hand_over
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench


class Overtaken:
    """Two workers; the second takes over from the first in the middle of what the first does."""

    def __init__(self, make_bench: MakeBench) -> None:
        self.stale, self.fresh = make_bench(), make_bench()
        self.effects: list[str] = []

    def take_over(self) -> None:
        """The lease ends while its holder is stopped, and somebody else drives the flow to its end."""
        if "taken over" not in self.effects:
            self.effects.append("taken over")
            self.fresh.recover()

    def define(self, body: Any) -> Any:
        definitions = [bench.flows.flow("overtaken")(body) for bench in (self.stale, self.fresh)]
        return definitions[0]


@pytest.fixture
def overtaken(make_bench: MakeBench) -> Overtaken:
    return Overtaken(make_bench)


def test_a_stale_drivers_record_is_refused(overtaken: Overtaken) -> None:
    def stopped() -> str:
        overtaken.take_over()
        overtaken.effects.append("ran")
        return "in time" if overtaken.effects.count("ran") == 1 else "late"

    def flow(run: Run) -> str:
        value = run.step(stopped)
        overtaken.effects.append("went on")
        return value

    handle = overtaken.define(flow).start()
    overtaken.stale.drive(handle.id)
    assert handle.result(0) == "in time"
    assert overtaken.effects == ["taken over", "ran", "went on", "ran"]
    [step] = overtaken.fresh.store.list_steps(handle.id)
    assert step.result_json == "in time"


def test_a_flow_that_catches_everything_does_not_swallow_a_lost_lease(overtaken: Overtaken) -> None:
    def stopped() -> str:
        overtaken.take_over()
        return "value"

    def other() -> str:
        overtaken.effects.append("other step")
        return "value"

    def flow(run: Run) -> str:
        for _ in range(3):
            try:
                run.step(stopped)
            except Exception:
                overtaken.effects.append("swallowed")
        return run.step(other)

    handle = overtaken.define(flow).start()
    overtaken.stale.drive(handle.id)
    assert overtaken.effects == ["taken over", "other step"]
    assert handle.result(0) == "value"


def test_cleanup_steps_do_not_run_when_a_lease_is_lost(overtaken: Overtaken) -> None:
    def stopped() -> str:
        overtaken.take_over()
        return "value"

    def clean() -> None:
        overtaken.effects.append("cleaned")

    def flow(run: Run) -> str:
        try:
            return run.step(stopped)
        finally:
            run.step(clean)

    handle = overtaken.define(flow).start()
    overtaken.stale.drive(handle.id)
    assert overtaken.effects == ["taken over", "cleaned"]
    assert handle.status() is FlowStatus.FINISHED


@pytest.mark.parametrize("moment", ["waiting", "finished", "failed", "step_scheduled"])
def test_a_stale_drivers_wait_join_and_end_are_refused(
    overtaken: Overtaken, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bench in (overtaken.stale, overtaken.fresh):

        @bench.task("member")
        def member() -> int:
            return 1

    def flow(run: Run, moment: str) -> int:
        if moment == "waiting":
            run.sleep(timedelta(milliseconds=300))
        if moment == "failed":
            raise ValueError("failed")
        if moment == "step_scheduled":
            run.gather([member.s(), member.s()])
        return 1

    handle = overtaken.define(flow).start(moment)
    changing = overtaken.stale.store.change
    struck = []

    def stop_before(change: Any, **more: Any) -> Any:
        if change.kind == moment:
            struck.append(moment)
            overtaken.take_over()
        return changing(change, **more)

    monkeypatch.setattr(overtaken.stale.store, "change", stop_before)
    overtaken.stale.drive(handle.id)
    assert struck == [moment]
    overtaken.fresh.work()
    if moment == "failed":
        assert handle.status() is FlowStatus.FAILED
    else:
        assert overtaken.fresh.finish(overtaken.fresh.flows.handle(handle.id)) == 1
    kinds = overtaken.fresh.kinds(handle.id)
    assert kinds.count(moment) == (2 if moment == "step_scheduled" else 1)


def test_a_stale_drivers_park_is_refused(overtaken: Overtaken, monkeypatch: pytest.MonkeyPatch) -> None:
    def flow(run: Run) -> Any:
        return run.wait_for("approval", "o-1")

    handle = overtaken.define(flow).start()
    looking = hand_over

    def stop_before(*args: Any, **kwargs: Any) -> int:
        moved = looking(*args, **kwargs)
        monkeypatch.setattr(driver, "hand_over", looking)
        overtaken.fresh.end_leases()
        overtaken.fresh.sweep()
        overtaken.fresh.drive(handle.id)
        return moved

    monkeypatch.setattr(driver, "hand_over", stop_before)
    overtaken.stale.drive(handle.id)
    [row] = overtaken.fresh.rows(handle.id)
    assert (row.worker, row.fence, row.due_at) == (None, 2, None)
    overtaken.fresh.flows.emit("approval", "o-1", "yes")
    assert overtaken.fresh.finish(overtaken.fresh.flows.handle(handle.id)) == "yes"


def test_a_stale_steps_outcome_and_retry_are_refused(make_bench: MakeBench) -> None:
    stale, fresh = make_bench(), make_bench()
    ran: list[str] = []

    @stale.task("stopped", bind=True)
    def stopped(self: Any, retries: bool) -> str:
        fresh.end_leases()
        fresh.sweep()
        fresh.work()
        ran.append("stale")
        if retries:
            raise self.retry(countdown=0)
        return "late"

    @fresh.task("stopped")
    def quick(retries: bool) -> str:
        ran.append("fresh")
        return "in time"

    def flow(run: Run, retries: bool) -> str:
        return run.step(stopped, retries)

    for bench in (stale, fresh):
        definition = bench.flows.flow("overtaken")(flow)
    for retries in (False, True):
        ran.clear()
        handle = definition.start(retries)
        fresh.drive(handle.id)
        [step] = fresh.store.list_steps(handle.id)
        stale.run_step(step.run_id)
        assert ran == ["fresh", "stale"]
        assert handle.result(0) == "in time"
        assert "step_retrying" not in fresh.kinds(handle.id)


def let_pass(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[], float]) -> None:
    """Has the clock by which a worker measures its leases show so many seconds more."""
    for module in (claimed, lease):
        monkeypatch.setattr(module, "boottime", lambda: clock.boottime() + seconds())


def test_a_driver_whose_lease_may_have_ended_renews_it_before_a_step(
    overtaken: Overtaken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps the process was stopped for longer than its lease, and overtaken: the second must not begin."""
    passed = [0.0]
    let_pass(monkeypatch, lambda: passed[0])

    def first() -> int:
        return 1

    def second() -> int:
        overtaken.effects.append("second")
        return 2

    def flow(run: Run) -> int:
        run.step(first)
        if "taken over" not in overtaken.effects:
            passed[0] = 3600.0
            overtaken.take_over()
        return run.step(second)

    handle = overtaken.define(flow).start()
    overtaken.stale.drive(handle.id)
    assert overtaken.effects == ["taken over", "second"]
    assert handle.result(0) == 2


def test_a_driver_that_was_slow_but_not_overtaken_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = [0.0]
    let_pass(monkeypatch, lambda: passed[0])

    def slow() -> int:
        passed[0] += 3600.0
        return 1

    @bench.flows.flow("slow")
    def flow(run: Run) -> int:
        return run.step(slow) + run.step(slow)

    handle = flow.start()
    bench.drive(handle.id)
    assert handle.result(0) == 2


def test_a_step_whose_claim_took_longer_than_the_lease_makes_sure_of_it(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, fresh = make_bench(), make_bench()

    def define(bench: Bench) -> Any:
        @bench.task("member")
        def member() -> str:
            bench.effects.append("ran")
            return "value"

        @bench.flows.flow("members")
        def flow(run: Run) -> str:
            return run.step(member)

        return flow

    define(fresh)
    handle = define(bench).start()
    bench.drive(handle.id)
    [step] = bench.store.list_steps(handle.id)
    claiming = bench.store.attempt

    def stopped_after(*args: Any, **kwargs: Any) -> Any:
        claim = claiming(*args, **kwargs)
        fresh.recover()
        let_pass(monkeypatch, lambda: 3600.0)
        return claim

    monkeypatch.setattr(bench.store, "attempt", stopped_after)
    bench.run_step(step.run_id)
    assert (bench.effects, fresh.effects) == ([], ["ran"])
    assert handle.result(0) == "value"


# ---- messages -------------------------------------------------------------------------------------------------------


def test_doubled_and_late_messages_do_nothing(bench: Bench) -> None:
    @bench.task("member")
    def member() -> int:
        bench.effects.append("ran")
        return 1

    @bench.flows.flow("doubled")
    def doubled(run: Run) -> int:
        run.wait_for("approval", "x")
        return run.step(member)

    handle = doubled.start()
    for _ in range(3):
        bench.drive(handle.id)
    assert bench.kinds(handle.id).count("waiting") == 1
    bench.flows.emit("approval", "x")
    bench.drive(handle.id)
    [step] = [step for step in bench.store.list_steps(handle.id) if step.task == "member"]
    for _ in range(3):
        bench.run_step(step.run_id)
        bench.drive(handle.id)
    assert bench.effects == ["ran"]
    assert step.but(status=FlowStepStatus.SUCCEEDED).run_id == step.run_id
    assert bench.kinds(handle.id).count("finished") == 1


def test_a_message_for_work_that_is_held_does_nothing(bench: Bench) -> None:
    @bench.task("member")
    def member(flow_id: str, run_id: str | None) -> int:
        bench.effects.append("ran")
        [step] = bench.store.list_steps(bench.flows.handle(flow_id).id)
        bench.run_step(step.run_id)
        bench.drive(bench.flows.handle(flow_id).id)
        return 1

    @bench.flows.flow("held")
    def held(run: Run) -> int:
        return run.step(member, str(run.flow_id), None)

    assert bench.finish(held.start()) == 1
    assert bench.effects == ["ran"]


NONSENSE = [None, 7, "", "not an id", ["a"], {"a": 1}, "\0", "x" * 5000, "01a20bf6-0bb1-76f5-b66c-89f0aaba3a44"]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=[repr(value)[:20] for value in NONSENSE])
def test_messages_with_malformed_or_foreign_ids_are_dropped(
    bench: Bench, nonsense: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for name, field in [("flows.drive", "flow_id"), ("flows.step", "run_id")]:
        caplog.clear()
        task = bench.app.tasks[name]
        task.apply(kwargs={field: nonsense, "unknown": 1}, throw=True)
        if nonsense != NONSENSE[-1] and not (name == "flows.step" and nonsense == "not an id"):
            assert "dropped" in caplog.text


def test_messages_without_any_id_are_dropped(bench: Bench) -> None:
    for name in ("flows.drive", "flows.step"):
        bench.app.tasks[name].apply(throw=True)


def test_the_engine_wears_its_own_fence_on_each_claim(bench: Bench) -> None:
    @bench.flows.flow("fenced")
    def fenced(run: Run) -> None:
        run.sleep(timedelta(milliseconds=1))
        run.sleep(timedelta(milliseconds=1))

    handle = fenced.start()
    bench.finish(handle)
    events = bench.store.list_events(handle.id, None)[::-1]
    assert [event.payload_json["fence"] for event in events if "fence" in event.payload_json] == [1, 2, 3]
