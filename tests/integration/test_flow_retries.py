"""A step that failed is tried again as its policy says; every attempt is in the history."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from celery_flows import FlowFailed, FlowStatus, InvalidData, Permanent, Retry, Run, StepFailed, step
from celery_flows.store.tables import flow_dispatch
from celery_flows.tasks.driver import MOMENT_SECONDS
from tests.support.bench import Bench

MOMENT = timedelta(milliseconds=1)
LONG = timedelta(hours=1)
TWICE_MORE = Retry(3, initial=MOMENT, jitter=False)


def failing(bench: Bench, times: int, error: BaseException | None = None) -> Callable[[str], str]:
    """A function that fails so often before it succeeds."""
    left = [times]

    def work(name: str) -> str:
        bench.effects.append(name)
        if left[0] > 0:
            left[0] -= 1
            raise error or ConnectionError("away")
        return f"{name} done"

    return work


def attempts_told(bench: Bench, flow_id: Any) -> list[tuple[str, Any]]:
    """Each event of a step with the error it tells of."""
    events = bench.store.list_events(flow_id, None)[::-1]
    steps = [event for event in events if event.kind.startswith("step_")]
    return [(event.kind, (event.payload_json["step"].get("error_json") or {}).get("message")) for event in steps]


def test_an_inline_step_is_tried_until_it_succeeds(bench: Bench) -> None:
    work = failing(bench, 2)

    @bench.flows.flow("retries")
    def retries(run: Run) -> str:
        return run.options(retry=TWICE_MORE).step(work, "a")

    handle = retries.start()
    assert bench.finish(handle) == "a done"
    assert bench.effects == ["a", "a", "a"]
    assert attempts_told(bench, handle.id) == [
        ("step_retrying", "away"), ("step_retrying", "away"), ("step_succeeded", None),
    ]  # fmt: skip
    [row] = bench.store.list_steps(handle.id)
    assert (row.attempt, row.error_json) == (3, None)


def test_the_last_attempt_is_the_steps_failure(bench: Bench) -> None:
    work = failing(bench, 3)

    @bench.flows.flow("fails")
    def fails(run: Run) -> str:
        return run.options(retry=TWICE_MORE).step(work, "a")

    handle = fails.start()
    with pytest.raises(FlowFailed, match="ConnectionError: away"):
        bench.finish(handle)
    assert len(bench.effects) == 3
    assert [row.attempt for row in bench.store.list_steps(handle.id)] == [3]


def test_a_long_pause_frees_the_worker_and_is_kept(bench: Bench) -> None:
    work = failing(bench, 1)

    @bench.flows.flow("patient")
    def patient(run: Run) -> str:
        return run.options(retry=Retry(2, initial=LONG, jitter=False)).step(work, "a")

    handle = patient.start()
    bench.work()
    assert timedelta(seconds=MOMENT_SECONDS) < LONG
    [row] = bench.rows(handle.id)
    assert (row.worker, row.publish_count) == (None, 0)
    assert bench.claimable() == []
    bench.call_driver(handle.id)  # somebody calls early: the next attempt still waits for its time
    bench.work()
    assert bench.effects == ["a"]
    [early] = bench.rows(handle.id)
    assert abs(early.due_at - row.due_at) < timedelta(seconds=1)


def test_a_cancel_during_the_pause_comes_through(bench: Bench) -> None:
    work = failing(bench, 1)

    @bench.flows.flow("patient")
    def patient(run: Run) -> str:
        return run.options(retry=Retry(2, initial=LONG)).step(work, "a")

    handle = patient.start()
    bench.work()
    handle.cancel()
    bench.work()
    assert handle.status() is FlowStatus.CANCELLED
    assert bench.effects == ["a"]


@pytest.mark.parametrize(
    ("retry", "error", "attempts"),
    [
        (Retry(3, initial=MOMENT, on=(OSError,)), ConnectionError("x"), 3),
        (Retry(3, initial=MOMENT, on=(OSError,)), ValueError("x"), 1),
        (Retry(3, initial=MOMENT, unless=(ConnectionError,)), ConnectionResetError("x"), 1),
        (Retry(3, initial=MOMENT, unless=(ConnectionError,)), ValueError("x"), 3),
        (Retry(3, initial=MOMENT), Permanent("x"), 1),
    ],
)
@pytest.mark.parametrize("kind", ["inline", "celery"])
def test_which_errors_are_tried_again(bench: Bench, retry: Retry, error: Exception, attempts: int, kind: str) -> None:
    work = failing(bench, 99, error)
    task = bench.task("works")(work)

    @bench.flows.flow("picky")
    def picky(run: Run) -> str:
        return run.options(retry=retry).step(task if kind == "celery" else work, "a")

    with pytest.raises(FlowFailed):
        bench.finish(picky.start())
    assert len(bench.effects) == attempts


def test_a_celery_step_is_tried_again_by_the_flows_policy(bench: Bench) -> None:
    task = bench.task("works")(failing(bench, 2))

    @bench.flows.flow("retries", retry=TWICE_MORE)
    def retries(run: Run) -> list[str]:
        return run.gather([task.s("a")])

    handle = retries.start()
    assert bench.finish(handle) == ["a done"]
    told = [event for event in attempts_told(bench, handle.id) if event[0] != "step_started"]
    assert told == [
        ("step_scheduled", None), ("step_retrying", "away"), ("step_retrying", "away"), ("step_succeeded", None),
    ]  # fmt: skip


def test_the_nearest_policy_counts(bench: Bench) -> None:
    inner = step(retry=Retry(2, initial=MOMENT))(failing(bench, 99))

    @bench.flows.flow("layers", retry=Retry(4, initial=MOMENT))
    def layers(run: Run) -> None:
        for options in ({}, {"retry": Retry(3, initial=MOMENT)}):
            with pytest.raises(StepFailed):
                run.options(**options).step(inner, "inner")  # type: ignore[arg-type]
        with pytest.raises(StepFailed):
            run.step(failing(bench, 99), "outer")

    bench.finish(layers.start())
    assert (bench.effects.count("inner"), bench.effects.count("outer")) == (2 + 3, 4)


def test_a_result_that_is_not_json_is_not_tried_again(bench: Bench) -> None:
    @step(retry=Retry(5, initial=MOMENT))
    def bad() -> Any:
        bench.effects.append("ran")
        return object()

    @bench.flows.flow("bad")
    def flow(run: Run) -> Any:
        return run.step(bad)

    with pytest.raises(FlowFailed):
        bench.finish(flow.start())
    assert bench.effects == ["ran"]


def test_a_crash_between_attempts_takes_up_the_attempt_that_was_left(bench: Bench) -> None:
    work = failing(bench, 1)

    @bench.flows.flow("patient")
    def patient(run: Run) -> str:
        return run.options(retry=Retry(2, initial=LONG, jitter=False)).step(work, "a")

    handle = patient.start()
    bench.work()
    with bench.store.engine.begin() as connection:  # its worker's lease has ended, as after a crash
        connection.execute(flow_dispatch.update().values(worker="node/1"))
    bench.end_leases()
    bench.sweep()
    bench.work()
    assert bench.effects == ["a"]
    assert [row.attempt for row in bench.store.list_steps(handle.id)] == [2]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_attempts": 0}, "retry.max_attempts"),
        ({"max_attempts": True}, "retry.max_attempts"),
        ({"initial": timedelta(seconds=-1)}, "retry.initial"),
        ({"maximum": 5}, "retry.maximum"),
        ({"factor": 0.5}, "retry.factor"),
        ({"factor": float("nan")}, "retry.factor"),
        ({"on": ("ValueError",)}, "retry.on"),
        ({"unless": 3}, "retry.unless"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidData) as refused:
        Retry(**options)
    assert refused.value.field == field
