"""What those are told who wait for a flow that failed of a step: which step, and what of, however deep it lies."""

from __future__ import annotations

import pickle
import threading
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa

from celery_flows import AsyncRun, FlowFailed, Run, StepFailed, StepTimedOut
from celery_flows.store.tables import flows as flow_rows
from tests.support.bench import Bench


class CardDeclined(Exception):
    pass


def hang() -> None:
    threading.Event().wait(20)


def decline() -> None:
    raise CardDeclined("no funds")


def failure_of(bench: Bench, definition: Any) -> FlowFailed:
    with pytest.raises(FlowFailed) as failed:
        bench.finish(definition.start())
    return failed.value


def told(failed: StepFailed | None) -> tuple[str, str, str]:
    assert failed is not None
    return failed.step, failed.type, failed.message


DECLINED = ("decline", "CardDeclined", "no funds")


def paying(bench: Bench, where: str) -> Any:
    """A flow that fails of its one step."""
    if where == "async":

        @bench.flows.flow("pay")
        async def pay_async(run: AsyncRun) -> None:
            await run.step(decline)

        return pay_async
    task = bench.task("decline")(decline)

    @bench.flows.flow("pay")
    def pay(run: Run) -> None:
        run.step(task if where == "celery" else decline)

    return pay


@pytest.mark.parametrize("where", ["inline", "celery", "async"])
def test_the_caller_is_told_of_the_step(bench: Bench, where: str) -> None:
    failed = failure_of(bench, paying(bench, where))
    assert (failed.type, failed.message) == ("StepFailed", "step decline failed with CardDeclined: no funds")
    assert told(failed.cause) == DECLINED
    assert failed.__cause__ is failed.cause  # a traceback shows it
    assert told(pickle.loads(pickle.dumps(failed)).cause) == DECLINED


def test_a_childs_failure_leads_to_the_childs_step(bench: Bench) -> None:
    child = paying(bench, "celery")

    @bench.flows.flow("parent")
    def parent(run: Run) -> None:
        run.flow(child)

    @bench.flows.flow("grandparent")
    def grandparent(run: Run) -> None:
        run.flow(parent)

    failed = failure_of(bench, grandparent)
    steps: list[Any] = [failed.cause]
    while steps[-1].cause is not None:
        steps.append(steps[-1].cause)
    assert [step.step for step in steps] == ["parent", "pay", "decline"]
    assert told(steps[-1]) == DECLINED
    assert steps[0].__cause__ is steps[1]


def test_a_gather_that_collects_failures_tells_the_same(bench: Bench) -> None:
    child, task = paying(bench, "inline"), bench.task("decline")(decline)

    @bench.flows.flow("collects")
    def collects(run: Run) -> list[Any]:
        of_child, of_task = run.gather([child.s(), task.s()], return_exceptions=True)
        return [told(of_child.cause), told(of_task), of_task.cause]

    assert bench.finish(collects.start()) == [list(DECLINED), list(DECLINED), None]


def test_an_error_that_is_raised_from_a_steps_failure_keeps_it(bench: Bench) -> None:
    class OrderFailed(Exception):
        pass

    @bench.flows.flow("raises from")
    def raises_from(run: Run) -> None:
        try:
            run.step(decline)
        except StepFailed as failed:
            raise OrderFailed("not paid") from failed

    failed = failure_of(bench, raises_from)
    assert (failed.type, failed.message) == ("OrderFailed", "not paid")
    assert told(failed.cause) == DECLINED


def test_a_flow_that_fails_of_itself_has_no_step_to_tell_of(bench: Bench) -> None:
    @bench.flows.flow("fails")
    def fails(run: Run) -> None:
        with suppress(StepFailed):
            run.step(decline)
        raise LookupError("of itself")

    failed = failure_of(bench, fails)
    assert (failed.type, failed.cause, failed.__cause__) == ("LookupError", None, None)


def test_a_failure_of_a_flows_own_making_is_told_as_well_as_may_be(bench: Bench) -> None:
    class Odd(StepFailed):
        def __init__(self) -> None:
            self.step, self.message = "a\0b", object()  # type: ignore[assignment]

    @bench.flows.flow("odd")
    def odd(run: Run) -> None:
        raise Odd

    failed = failure_of(bench, odd)
    assert failed.type == "Odd"
    assert failed.cause is not None
    assert (failed.cause.step, failed.cause.type) == ("a\N{REPLACEMENT CHARACTER}b", "")


def test_rows_that_do_not_tell_of_the_step_are_read(bench: Bench) -> None:
    handle = paying(bench, "inline").start()
    bench.work()
    with bench.store.engine.begin() as connection:
        old = {"type": "StepFailed", "message": "step decline failed with CardDeclined: no funds"}
        connection.execute(sa.update(flow_rows).values(error_json=old))
    with pytest.raises(FlowFailed, match="CardDeclined: no funds") as failed:
        handle.result(0)
    assert failed.value.cause is None
    with bench.store.engine.begin() as connection:  # for the audit
        connection.execute(sa.update(flow_rows).values(error_json={**old, "cause": _cause()}))


def _cause() -> dict[str, str]:
    return dict(zip(("step", "type", "message"), DECLINED, strict=True))


# ---- whose class it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["StepTimedOut", "StepLost"])
@pytest.mark.parametrize("where", ["inline", "celery"])
def test_a_users_class_of_the_same_name_is_not_taken_for_ours(bench: Bench, name: str, where: str) -> None:
    theirs = type(name, (Exception,), {})

    def work() -> None:
        raise theirs("theirs")

    task = bench.task("work")(work)

    @bench.flows.flow("flow")
    def flow(run: Run) -> list[Any]:
        try:
            run.step(task if where == "celery" else work)
        except StepFailed as failed:
            run.wait_for("go", "on")  # the second time, the failure is replayed
            return [type(failed).__module__, type(failed).__name__, failed.type]
        return []

    handle = flow.start()
    bench.work()
    bench.flows.emit("go", "on")
    bench.work()
    assert handle.result(0) == [StepFailed.__module__, "StepFailed", name]


def test_a_users_cancelled_is_the_first_failure_like_any_other(bench: Bench) -> None:
    """Children that are cancelled because another member failed are not the failure; this is."""
    theirs = type("FlowCancelled", (Exception,), {})

    @bench.flows.flow("first")
    def first(run: Run) -> None:
        raise theirs

    @bench.flows.flow("second")
    def second(run: Run) -> None:
        raise LookupError

    @bench.flows.flow("parent")
    def parent(run: Run) -> str:
        try:
            run.gather([first.s(), second.s()])
        except StepFailed as failed:
            return failed.step
        return ""

    handle = parent.start()
    bench.drive(handle.id)
    children = [UUID(run_id) for kind, run_id in bench.claimable() if kind == "drive"]
    for child in reversed(children):
        bench.drive(child)
    assert bench.finish(handle) == "first"


def test_a_childs_step_that_took_too_long_is_the_cause_and_the_child_has_failed(bench: Bench) -> None:
    """The child itself took no longer than it may."""

    @bench.flows.flow("child")
    def child(run: Run) -> None:
        run.options(timeout=timedelta(milliseconds=20)).step(hang)

    @bench.flows.flow("parent")
    def parent(run: Run) -> list[str]:
        try:
            run.flow(child)
        except StepFailed as failed:
            return [type(failed).__name__, failed.type, type(failed.cause).__name__]
        return []

    assert bench.finish(parent.start()) == ["StepFailed", "StepTimedOut", "StepTimedOut"]
    failed = failure_of(bench, child)
    assert isinstance(failed.cause, StepTimedOut)
