"""What people do to flows by hand, and what a flow may do while it cleans up."""

from __future__ import annotations

from datetime import timedelta

import pytest

from celery_flows import FlowCancelled, FlowManager, FlowStatus, FlowStepStatus, IllegalTransition, Run, StepFailed
from celery_flows.store.changes import Completion
from celery_flows.store.dispatch import claim_step, complete_step
from celery_flows.tasks.waits import WaitEngine
from tests.support.bench import Bench

NAMES = {"controller_id": "by hand", "owner_session_key": "me"}


@pytest.mark.parametrize("waits_for", ["sleep", "event"])
def test_a_driven_flow_that_is_resumed_by_hand_goes_on_past_its_wait(bench: Bench, waits_for: str) -> None:
    @bench.flows.flow("waits")
    def waits(run: Run) -> str:
        if waits_for == "sleep":
            run.sleep(timedelta(days=30))
            return "awake"
        return str(run.wait_for("approval", "order-1")["by"])

    handle = waits.start()
    bench.work()
    assert handle.status() is FlowStatus.WAITING

    handle.resume({"by": "Ada"})

    assert bench.finish(handle) == ("awake" if waits_for == "sleep" else "Ada")


def test_a_flow_that_no_definition_drives_is_resumed_with_the_payload_in_its_state(bench: Bench) -> None:
    manager = bench.flows.manager
    flow = manager.create_managed(**NAMES)
    manager.start_running(flow.id)
    manager.set_waiting(flow.id, {"kind": "manual"})

    bench.flows.handle(flow.id).resume({"by": "Ada"})

    resumed = manager.get(flow.id)
    assert (resumed.status, resumed.wait_json, resumed.state_json) == (FlowStatus.RUNNING, None, {"by": "Ada"})


@pytest.mark.parametrize("locked", [False, True])
def test_a_driven_flow_cannot_be_made_to_wait_by_hand(bench: Bench, locked: bool) -> None:
    @bench.flows.flow("drives")
    def drives(run: Run) -> None:
        manager = FlowManager(bench.store, tries=1) if locked else bench.flows.manager
        with pytest.raises(IllegalTransition, match="its flow function says when it waits"):
            manager.set_waiting(run.flow_id, {"kind": "manual"})

    bench.finish(drives.start())


@pytest.mark.parametrize("timeout_has_passed", [False, True])
def test_an_event_that_lies_in_the_inbox_resumes_a_flow_that_waits_by_hand(
    bench: Bench, timeout_has_passed: bool
) -> None:
    manager = bench.flows.manager
    bench.flows.emit("topic", "key", {"n": 1})
    flow = manager.create_managed(**NAMES)
    manager.start_running(flow.id)
    timeout = {"timeout_at": "2020-01-01T00:00:00Z"} if timeout_has_passed else {}
    manager.set_waiting(flow.id, {"kind": "external_event", "topic": "topic", "correlation_id": "key", **timeout})

    report = WaitEngine(bench.store).tick()

    assert (report.scanned, report.resumed) == (1, 1)
    assert manager.get(flow.id).state_json == {"resume_event": {"n": 1}}


def test_what_handles_a_failed_gather_does_not_run_beside_its_members(bench: Bench) -> None:
    @bench.task("member")
    def member(number: int) -> int:
        bench.effects.append(number)
        if number > 0:
            raise RuntimeError(f"member {number} fails")
        return number

    def refund() -> str:
        bench.effects.append("refund")
        return "refunded"

    @bench.flows.flow("gathers")
    def gathers(run: Run) -> str:
        try:
            run.gather(member.s(number) for number in range(3))
        except StepFailed as failure:
            return f"{run.step(refund)}: {failure.message}"
        return "no failure"

    handle = gathers.start()
    bench.drive(handle.id)
    zero, _, two = sorted(bench.store.list_steps(handle.id), key=lambda step: step.position)
    held = bench.store.run(claim_step, zero.run_id, "another worker", 30.0)
    assert held is not None

    bench.run_step(two.run_id)  # fails; the flow is called, and finds member 0 running

    assert bench.effects == [2]
    assert handle.status() is FlowStatus.RUNNING
    succeeded = Completion(held.holder, handle.id, FlowStepStatus.SUCCEEDED, result="0")
    assert bench.store.run(complete_step, succeeded) is not None
    assert bench.finish(handle) == "refunded: member 2 fails"
    assert bench.effects == [2, "refund"]
    statuses = {step.position: step.status for step in bench.store.list_steps(handle.id) if step.task == "member"}
    assert statuses == {1: FlowStepStatus.SUCCEEDED, 2: FlowStepStatus.CANCELLED, 3: FlowStepStatus.FAILED}


def test_cleanup_cannot_wait_and_the_flow_still_ends_as_cancelled(bench: Bench) -> None:
    refused: list[str] = []

    @bench.flows.flow("sleeps")
    def sleeps(run: Run) -> None:
        try:
            run.sleep(timedelta(days=1))
        except FlowCancelled:
            try:
                run.sleep(timedelta(seconds=1))
            except Exception as error:
                refused.append(str(error))
            raise

    handle = sleeps.start()
    bench.work()
    handle.cancel()
    bench.work()

    assert handle.status() is FlowStatus.CANCELLED
    assert refused == ["step sleep: cannot wait: the flow cleans up"]


def test_a_wait_that_was_reached_forgets_the_crashes_before_it(bench: Bench) -> None:
    @bench.flows.flow("sleeps")
    def sleeps(run: Run) -> None:
        if len(bench.effects) < 3:
            bench.effects.append("crash")
            raise SystemExit(1)
        run.sleep(timedelta(milliseconds=1))

    handle = sleeps.start()
    for _ in range(3):
        with pytest.raises(SystemExit):
            bench.drive(handle.id)
        bench.sweep()
    assert bench.rows(handle.id)[0].crash_count == 3

    bench.drive(handle.id)

    assert bench.rows(handle.id)[0].crash_count == 0
    bench.finish(handle)
