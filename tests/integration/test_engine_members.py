"""Celery steps and gathers: each a row of its own, joined by counting, in whatever order they end."""

from __future__ import annotations

import itertools
from datetime import timedelta
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from celery import Celery, Task, group
from celery.exceptions import Ignore, Reject
from pydantic import BaseModel

from celery_flows import FlowFailed, FlowStatus, FlowStepStatus, InvalidData, Run, StepFailed
from celery_flows.tasks.ahead import LEAST
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench

MOMENT = timedelta(milliseconds=5)


class Label(BaseModel):
    box: int


class Tasks(NamedTuple):
    square: Task[Any, int]
    boom: Task[Any, int]
    label: Task[Any, Label]


def add_tasks(bench: Bench) -> Tasks:
    """The user's own tasks, as a user writes them."""

    @bench.task("square")
    def square(n: int) -> int:
        bench.effects.append(n)
        return n * n

    @bench.task("boom")
    def boom(text: str = "bad") -> int:
        bench.effects.append("boom")
        raise RuntimeError(text)

    @bench.task("label")
    def label(box: int) -> Label:
        return Label(box=box)

    return Tasks(square, boom, label)


def members(bench: Bench, flow_id: UUID) -> list[str]:
    """The run ids of a flow's members, in the order they were gathered."""
    return [step.run_id for step in sorted(bench.store.list_steps(flow_id), key=lambda step: step.position)]


def test_a_celery_step_runs_as_a_task_while_the_driver_is_free(bench: Bench) -> None:
    tasks = add_tasks(bench)

    @bench.flows.flow("one")
    def one(run: Run) -> int:
        return run.step(tasks.square, 4) + 1

    handle = one.start()
    bench.drive(handle.id)
    drive, step = bench.rows(handle.id)
    assert (drive.worker, drive.due_at, drive.open_members) == (None, None, 1)
    assert (step.kind, step.task, step.publish_count) == ("step", "square", 1)
    assert bench.finish(handle) == 17
    assert bench.effects == [4]


def test_messages_carry_ids_only(bench: Bench) -> None:
    tasks = add_tasks(bench)

    @bench.flows.flow("ids")
    def ids(run: Run, secret: str) -> list[int]:
        return run.gather([tasks.square.s(3), tasks.square.s(4)])

    handle = ids.start("hunter2")
    bench.drive(handle.id)
    drive, *steps = bench.messages()
    assert (drive.task, drive.id, drive.shadow) == ("flows.drive", str(handle.id), "ids")
    assert (drive.args, drive.kwargs) == ([], {"flow_id": str(handle.id)})
    assert [(step.task, step.id, step.shadow) for step in steps] == [
        ("flows.step", run_id, "square") for run_id in members(bench, handle.id)
    ]
    assert [step.kwargs for step in steps] == [{"flow_id": str(handle.id), "run_id": step.id} for step in steps]
    bench.work()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_results_come_in_the_order_of_the_members_however_they_end(bench: Bench, order: tuple[int, ...]) -> None:
    tasks = add_tasks(bench)

    @bench.flows.flow("ordered")
    def ordered(run: Run) -> list[int]:
        return run.gather(tasks.square.s(n) for n in (1, 2, 3))

    handle = ordered.start()
    bench.drive(handle.id)
    run_ids = members(bench, handle.id)
    for number in order:
        assert not handle.status().is_terminal
        bench.run_step(run_ids[number])
    assert handle.result(0) == [1, 4, 9]  # the last one's worker went on with the flow
    assert bench.effects == [number + 1 for number in order]


def test_the_last_members_worker_sends_the_message_if_it_must_not_drive(bench: Bench) -> None:
    tasks = add_tasks(bench)

    @bench.flows.flow("elsewhere")
    def elsewhere(run: Run) -> int:
        return run.step(tasks.square, 3)

    handle = elsewhere.start()
    bench.drive(handle.id)
    bench.messages()
    bench.run_step(members(bench, handle.id)[0], goes_on=False)
    assert [(message.task, message.id) for message in bench.messages()] == [("flows.drive", str(handle.id))]
    assert not handle.status().is_terminal
    assert bench.finish(handle) == 9


def test_driving_again_while_members_are_out_changes_nothing(bench: Bench) -> None:
    tasks = add_tasks(bench)

    @bench.flows.flow("patient")
    def patient(run: Run) -> list[int]:
        return run.gather(tasks.square.s(n) for n in range(3))

    handle = patient.start()
    bench.drive(handle.id)
    first, *rest = members(bench, handle.id)
    bench.flows.manager.update_state(handle.id, {"seen": True})
    bench.run_step(first)
    bench.call_driver(handle.id)
    bench.drive(handle.id)
    assert bench.rows(handle.id)[0].open_members == 2
    for run_id in rest:
        bench.run_step(run_id)
    assert handle.result(0) == [0, 1, 4]
    assert sorted(bench.effects) == [0, 1, 2]


def test_one_failure_raises_without_waiting_for_the_others(bench: Bench) -> None:
    tasks = add_tasks(bench)

    @bench.flows.flow("hasty")
    def hasty(run: Run) -> list[int]:
        return run.gather([tasks.square.s(1), tasks.boom.s(), tasks.square.s(2)])

    handle = hasty.start()
    bench.drive(handle.id)
    bench.run_step(members(bench, handle.id)[1])
    with pytest.raises(FlowFailed, match="step boom failed with RuntimeError: bad"):
        handle.result(0)
    bench.work()
    assert bench.effects == ["boom"]
    statuses = {step.task: step.status for step in bench.store.list_steps(handle.id)}
    assert statuses == {"boom": FlowStepStatus.FAILED, "square": FlowStepStatus.CANCELLED}


def test_the_first_failure_in_order_is_raised_live_and_replayed(bench: Bench) -> None:
    tasks = add_tasks(bench)

    @bench.flows.flow("blames")
    def blames(run: Run) -> str:
        try:
            run.gather([tasks.square.s(1), tasks.boom.s("first"), tasks.boom.s("second")])
        except StepFailed as failed:
            bench.effects.append(failed.message)
        run.sleep(MOMENT)
        return "went on"

    handle = blames.start()
    bench.drive(handle.id)
    for run_id in members(bench, handle.id)[:2]:
        bench.run_step(run_id)
    bench.finish(handle)
    assert bench.effects.count("first") == 2


def test_failing_waits_for_the_member_that_is_running(make_bench: MakeBench) -> None:
    """What a flow does after a failure must not run beside a member that still works."""
    bench, other = make_bench(), make_bench()
    tasks = add_tasks(bench)
    held: list[UUID] = []

    @other.task("square")
    def square(n: int) -> int:
        # While this member runs, its sibling fails, and the flow is driven on.
        bench.run_step(members(bench, held[0])[1])
        assert not bench.flows.handle(held[0]).status().is_terminal
        return n

    @bench.flows.flow("drains")
    def drains(run: Run) -> list[int]:
        return run.gather([tasks.square.s(7), tasks.boom.s(), tasks.square.s(8)])

    handle = drains.start()
    held.append(handle.id)
    bench.drive(handle.id)
    other.run_step(members(bench, handle.id)[0], goes_on=False)
    with pytest.raises(FlowFailed, match="boom"):
        bench.finish(handle)
    statuses = [step.status for step in sorted(bench.store.list_steps(handle.id), key=lambda s: s.position)]
    assert statuses == [FlowStepStatus.SUCCEEDED, FlowStepStatus.FAILED, FlowStepStatus.CANCELLED]


def test_an_empty_gather_is_no_wait(bench: Bench) -> None:
    @bench.flows.flow("empty")
    def empty(run: Run) -> list[int]:
        return run.gather([])

    assert bench.finish(empty.start()) == []


def test_gathers_may_follow_each_other(bench: Bench) -> None:
    tasks = add_tasks(bench)

    @bench.flows.flow("twice")
    def twice(run: Run) -> int:
        once = run.gather(tasks.square.s(n) for n in range(3))
        return sum(run.gather(tasks.square.s(n) for n in once))

    assert bench.finish(twice.start()) == 17
    assert len(bench.effects) == 6


def test_members_of_a_failed_gather_do_not_disturb_the_next(bench: Bench) -> None:
    tasks = add_tasks(bench)

    @bench.flows.flow("recovers")
    def recovers(run: Run) -> list[int]:
        try:
            run.gather([tasks.boom.s(), tasks.square.s(1), tasks.square.s(2)])
        except StepFailed:
            return run.gather([tasks.square.s(3), tasks.square.s(4)])
        return []

    handle = recovers.start()
    bench.drive(handle.id)
    bench.run_step(members(bench, handle.id)[0])
    assert bench.finish(handle) == [9, 16]


def test_many_members_are_joined(bench: Bench) -> None:
    tasks = add_tasks(bench)

    @bench.flows.flow("many")
    def many(run: Run) -> int:
        return sum(run.gather(tasks.square.s(n) for n in range(50)))

    assert bench.finish(many.start()) == sum(n * n for n in range(50))
    assert sorted(bench.effects) == list(range(50))


def test_members_that_wait_long_for_workers_do_not_fill_the_queue_with_duplicates(make_bench: MakeBench) -> None:
    """Nor do they keep from being sent what was begun, or a new flow."""
    bench = make_bench(sweep_limit=20, republish_seconds=3600)
    tasks = add_tasks(bench)

    @bench.flows.flow("many")
    def many(run: Run) -> int:
        return sum(run.gather(tasks.square.s(n) for n in range(100)))

    handle = many.start()
    bench.drive(handle.id)
    bench.messages()
    bench.pass_time()
    assert [bench.sweep().published for _ in range(3)] == [20, LEAST, LEAST]
    sent = [message.id for message in bench.messages()]
    assert len(set(sent)) == 20 + 2 * LEAST
    for run_id in sent[:30]:
        bench.run_step(run_id)
    assert bench.sweep().published == 20 - LEAST
    new = many.start()
    bench.call_driver(new.id)
    assert bench.sweep().published == 1 + LEAST
    new.cancel()
    assert bench.finish(handle) == sum(n * n for n in range(100))
    bench.work()


def test_results_of_tasks_are_read_back_by_their_annotation(bench: Bench) -> None:
    tasks = add_tasks(bench)

    @bench.flows.flow("labels")
    def labels(run: Run) -> list[int]:
        printed = run.gather([tasks.label.s(1), tasks.label.s(2)])
        return [label.box for label in printed]

    assert bench.finish(labels.start()) == [1, 2]


def test_a_task_result_that_cannot_be_json_fails_the_step(bench: Bench) -> None:
    @bench.task("strange")
    def strange() -> Any:
        return {"password": {1, 2}}

    @bench.flows.flow("strange")
    def flow(run: Run) -> Any:
        return run.step(strange)

    with pytest.raises(FlowFailed, match=r"result of step strange\.password: is set"):
        bench.finish(flow.start())


@pytest.mark.parametrize("bad", ["a\0b", b"raw", {1}, float("inf")], ids=["NUL", "bytes", "set", "infinity"])
def test_arguments_that_cannot_be_json_schedule_nothing(bench: Bench, bad: Any) -> None:
    tasks = add_tasks(bench)

    @bench.flows.flow("bad arguments")
    def flow(run: Run) -> Any:
        return run.gather([tasks.square.s(1), tasks.square.s(bad)])

    handle = flow.start()
    with pytest.raises(FlowFailed, match="arguments of step square") as failed:
        bench.finish(handle)
    assert failed.value.type == "InvalidData"
    assert bench.store.list_steps(handle.id) == []


def test_canvas_is_no_step(bench: Bench) -> None:
    tasks = add_tasks(bench)

    @bench.flows.flow("canvas")
    def canvas(run: Run) -> str:
        try:
            run.step(group([tasks.square.s(1)]))
        except InvalidData as refused:
            return str(refused)
        return "ran"

    assert "a Celery group is no step" in bench.finish(canvas.start())


def test_queue_priority_and_limits_are_the_tasks_or_the_signatures(bench: Bench) -> None:
    bench.app.conf.task_routes = {"routed": {"queue": "big"}}

    @bench.task("routed", time_limit=60)
    def routed() -> int:
        return 1

    @bench.flows.flow("routes")
    def routes(run: Run) -> list[int]:
        by_hand: Any = routed.s()
        return run.gather([routed.s(), by_hand.set(queue="small", priority=3, soft_time_limit=5)])

    handle = routes.start()
    bench.drive(handle.id)
    rows = {row.queue: row for row in bench.rows(handle.id)[1:]}
    assert {name: (row.priority, row.options) for name, row in rows.items()} == {
        "big": (None, {"time_limit": 60}),
        "small": (3, {"time_limit": 60, "soft_time_limit": 5}),
    }
    for queue in ("big", "small"):
        assert [message.id for message in bench.messages(queue)] == [rows[queue].run_id]
    assert bench.finish(handle) == [1, 1]


# ---- tasks as Celery runs them --------------------------------------------------------------------------------------


def test_retry_in_a_task_is_recorded_and_not_claimable_before_its_time(bench: Bench) -> None:
    @bench.task("flaky", bind=True, max_retries=3)
    def flaky(self: Task[Any, Any], n: int) -> int:
        bench.effects.append(self.request.retries)
        if self.request.retries < 2:
            raise self.retry(exc=ValueError("not yet"), countdown=3600)
        return n

    @bench.flows.flow("flaky")
    def flow(run: Run) -> int:
        return run.step(flaky, 7)

    handle = flow.start()
    bench.work()
    assert bench.effects == [0]
    [step] = bench.store.list_steps(handle.id)
    assert (step.status, step.attempt, step.error_json) == (
        FlowStepStatus.PENDING,
        2,
        {"type": "ValueError", "message": "not yet"},
    )
    bench.run_step(step.run_id)  # a late or doubled message comes too early
    assert bench.effects == [0]
    for _ in range(2):
        bench.pass_time()
        bench.work()
    assert handle.result(0) == 7
    assert bench.effects == [0, 1, 2]
    assert bench.kinds(handle.id).count("step_retrying") == 2


def test_retries_that_are_used_up_fail_the_step_with_the_tasks_own_error(bench: Bench) -> None:
    @bench.task("hopeless", bind=True, max_retries=1, default_retry_delay=0)
    def hopeless(self: Task[Any, Any]) -> int:
        bench.effects.append(self.request.retries)
        raise self.retry(exc=ValueError("never"))

    @bench.flows.flow("hopeless")
    def flow(run: Run) -> int:
        return run.step(hopeless)

    with pytest.raises(FlowFailed, match="step hopeless failed with ValueError: never"):
        bench.finish(flow.start())
    assert bench.effects == [0, 1]


def test_autoretry_for_is_obeyed(bench: Bench) -> None:
    @bench.task("auto", bind=True, autoretry_for=(OSError,), retry_backoff=False, default_retry_delay=0)
    def auto(self: Task[Any, Any]) -> int:
        bench.effects.append(self.request.retries)
        if self.request.retries < 2:
            raise OSError("busy")
        return 5

    @bench.flows.flow("auto")
    def flow(run: Run) -> int:
        return run.step(auto)

    assert bench.finish(flow.start()) == 5
    assert bench.effects == [0, 1, 2]


def test_a_bound_task_sees_a_request_of_its_own(bench: Bench) -> None:
    @bench.task("bound", bind=True)
    def bound(self: Task[Any, Any], n: int, *, scale: int = 1) -> dict[str, Any]:
        request = self.request
        return {
            "id": request.id, "root": request.root_id, "args": request.args, "kwargs": request.kwargs,
            "direct": request.called_directly, "task": self.name,
        }  # fmt: skip

    @bench.flows.flow("bound")
    def flow(run: Run) -> dict[str, Any]:
        return run.step(bound, 4, scale=2)

    handle = flow.start()
    seen = bench.finish(handle)
    [step] = bench.store.list_steps(handle.id)
    expected = {"args": [4], "kwargs": {"scale": 2}, "direct": False, "task": "bound"}
    assert seen == {"id": step.run_id, "root": str(handle.id), **expected}
    assert bound.request.id is None  # and nothing of it is left behind


def test_base_classes_and_their_call_are_obeyed(bench: Bench) -> None:
    class Doubling(Task):  # type: ignore[type-arg]
        abstract = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * self.run(*args, **kwargs)

    @bench.task("doubled", base=Doubling)
    def doubled(n: int) -> int:
        return n

    @bench.flows.flow("doubled")
    def flow(run: Run) -> int:
        return run.step(doubled, 21)

    assert bench.finish(flow.start()) == 42


def test_tasks_that_take_pydantic_models_are_given_them(bench: Bench) -> None:
    @bench.task("models", pydantic=True)
    def models(label: Label, *, count: int) -> Label:
        bench.effects.append(label)
        return Label(box=label.box + count)

    @bench.flows.flow("models")
    def flow(run: Run) -> int:
        printed: Label = run.step(models, Label(box=1), count=2)
        return printed.box

    assert bench.finish(flow.start()) == 3
    assert bench.effects == [Label(box=1)]


def test_ignore_closes_a_step_without_result_and_reject_fails_it(bench: Bench) -> None:
    @bench.task("ignored")
    def ignored() -> None:
        raise Ignore

    @bench.task("rejected")
    def rejected() -> None:
        raise Reject("unwanted")

    @bench.flows.flow("refusals")
    def flow(run: Run) -> list[Any]:
        said: list[Any] = [run.step(ignored)]
        try:
            run.step(rejected)
        except StepFailed as failed:
            said.append(failed.type)
        return said

    assert bench.finish(flow.start()) == [None, "Reject"]


def test_a_step_of_an_unknown_task_waits_for_a_worker_that_has_it(make_bench: MakeBench) -> None:
    bench, other = make_bench(), make_bench()
    tasks = add_tasks(bench)

    @bench.flows.flow("unknown task")
    def flow(run: Run) -> int:
        return run.step(tasks.square, 3)

    handle = flow.start()
    bench.drive(handle.id)
    other.run_step(members(bench, handle.id)[0])
    [_, row] = bench.rows(handle.id)
    assert (row.worker, row.publish_count, row.crash_count) == (None, 0, 0)
    assert bench.claimable() == []  # not at once: that would spin
    bench.pass_time()
    assert bench.finish(handle) == 9


def test_tasks_keep_working_outside_flows(bench: Bench) -> None:
    tasks = add_tasks(bench)
    assert tasks.square(3) == 9
    assert tasks.square.apply((4,)).get() == 16


def test_status_words_are_the_stores(bench: Bench) -> None:
    tasks = add_tasks(bench)

    @bench.flows.flow("words")
    def flow(run: Run) -> int:
        return run.step(tasks.square, 2)

    handle = flow.start()
    assert handle.status() is FlowStatus.CREATED
    bench.finish(handle)
    assert bench.kinds(handle.id) == [
        "created", "started", "step_scheduled", "step_started", "step_succeeded", "resumed", "finished",
    ]  # fmt: skip
    assert isinstance(bench.app, Celery)
