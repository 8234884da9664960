"""What a fresh look at the driver, the retries and the errors found."""

from __future__ import annotations

import sys
import traceback
from contextlib import closing
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from celery_flows import FlowFailed, Run, StoreError
from celery_flows.store import SqlFlowStore
from celery_flows.store import operations as op
from celery_flows.store.changes import Change, Drive, StepWrite
from celery_flows.store.engines import make_engine
from celery_flows.store.models import FlowStepStatus
from celery_flows.store.script import Call, Pause, attempts
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench
from tests.support.faults import MortalStore, Strikes
from tests.support.samples import a_flow


@pytest.mark.parametrize("handler", ["finally", "swallows"])
def test_a_step_that_ends_its_process_is_a_crash_whatever_the_flow_does_about_it(bench: Bench, handler: str) -> None:
    ends = [True]

    def exits() -> int:
        if ends:
            ends.pop()
            sys.exit(3)
        return 1

    def clean() -> None:
        bench.effects.append("cleaned")

    @bench.flows.flow("exits")
    def flow(run: Run) -> int:
        value = 0
        try:
            value = run.step(exits)
        except BaseException:
            if handler == "swallows":
                return run.step(int, 7)
            raise
        finally:
            run.step(clean)
        return value

    handle = flow.start()
    with pytest.raises(SystemExit):
        bench.drive(handle.id)
    assert bench.effects == [], "no cleanup beside a step that is to run again"
    assert not handle.status().is_terminal
    assert bench.sweep().published == 1
    assert bench.rows(handle.id)[0].crash_count == 1
    assert bench.finish(handle) == 1
    assert bench.effects == ["cleaned"]


def test_a_flow_that_exits_each_time_is_given_up(make_bench: MakeBench) -> None:
    bench = make_bench(max_crashes=3)

    def exits() -> None:
        bench.effects.append("ran")
        sys.exit(3)

    @bench.flows.flow("exits")
    def flow(run: Run) -> None:
        run.step(exits)

    handle = flow.start()
    for crash in range(3):
        with pytest.raises(SystemExit):
            bench.drive(handle.id)
        assert bench.sweep().lost == (crash == 2)
    with pytest.raises(FlowFailed) as failed:
        handle.result(0)
    assert (failed.value.reason, bench.effects) == ("lost", ["ran"] * 3)


def test_a_resume_whose_reply_was_lost_is_a_success(make_bench: MakeBench, engine_database: str) -> None:
    store = MortalStore(make_engine(engine_database))
    bench = make_bench(store=store)

    @bench.flows.flow("waits")
    def flow(run: Run) -> Any:
        return run.wait_for("approval", "1")

    handle = flow.start()
    bench.work()
    store.strike(2, Strikes.REPLY_LOST)  # the first looks which flow it is
    handle.resume({"by": "hand"})
    assert store.struck == "resume_by_hand"
    assert bench.finish(handle) == {"by": "hand"}
    assert bench.kinds(handle.id).count("resumed") == 2  # by hand; by the claim


def test_a_horizon_that_was_lowered_does_not_fail_who_sleeps_already(make_bench: MakeBench) -> None:
    def define(bench: Bench) -> Any:
        @bench.flows.flow("sleeps")
        def flow(run: Run) -> str:
            run.sleep(timedelta(days=60))
            return "rested"

        return flow

    before, after = make_bench(), make_bench(timer_horizon_days=30)
    handle = define(before).start()
    define(after)
    before.work()
    after.call_driver(handle.id)  # somebody calls, long before the time
    after.work()
    assert handle.status() == "waiting"


def test_a_start_that_was_sent_twice_knows_its_own_first_try() -> None:
    """The first INSERT outlives its connection and commits just before the second, which then finds the id taken."""
    lost = sa.exc.OperationalError("INSERT", {}, OSError("gone"), connection_invalidated=True)
    write, look = Call(lambda: None), Call(lambda: None)
    answers = iter([lost, None, False, True])  # the first try; not there yet; the id is taken; by ourselves
    script = attempts(write, settled=look)
    step = next(script)
    ended: list[Any] = []
    while not ended:
        answer = None if isinstance(step, Pause) else next(answers)
        try:
            step = script.throw(answer) if isinstance(answer, Exception) else script.send(answer)
        except StopIteration as end:
            ended.append(end.value)
    assert ended == [True]


def test_a_steps_secret_is_in_no_traceback(postgresql_url: str) -> None:
    """PostgreSQL repeats the row that it refuses in the details of its error."""
    with closing(SqlFlowStore(make_engine(postgresql_url))) as store:
        with store.engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE flow_steps ADD CONSTRAINT none CHECK (result_json IS NULL)")
        flow = a_flow()
        assert store.run(op.create_flow, flow, {}, Drive("d"))
        step = StepWrite("r", "card", FlowStepStatus.SUCCEEDED, 1, result='"hunter2"')
        with pytest.raises(StoreError) as caught:
            store.change(Change(flow.id, 1, "step_succeeded", {"current_step": "card"}, step=step))
    text = "".join(traceback.format_exception(caught.value))
    assert "violates check constraint" in text
    assert "hunter2" not in text
