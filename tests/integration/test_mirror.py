"""Canvases that Celery runs as ever, seen as flows: what is shown of each kind, and when the flow is over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import chain, chord, group

from celery_flows import FlowHandle, FlowStatus, InvalidData
from celery_flows.store import FlowMode, FlowStep, StepRuntime
from celery_flows.tasks.observer import Observer
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench
from tests.support.consumer import Consumer


class Refused(Exception):
    pass


class Shop:
    """A few tasks, a worker's hands, and the flows that mirror them."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.flows = bench, bench.flows
        self.consumer = Consumer(bench)
        self.refusals = 0  # how often pack refuses
        # The tasks say nothing of flows.

        @bench.task("shop.pick")
        def pick(number: int) -> int:
            return number

        @bench.task("shop.pack", bind=True, max_retries=2)
        def pack(self_: Any, number: int) -> int:
            if self.refusals:
                self.refusals -= 1
                raise self_.retry(exc=Refused("the box is too small"), countdown=0)
            return number

        @bench.task("shop.total")
        def total(numbers: list[int]) -> int:
            return sum(numbers)

        @bench.task("shop.refuse")
        def refuse(*_: Any) -> None:
            raise Refused("no")

        @bench.task("shop.order")
        def order(*children: str) -> None:
            for name in children:
                bench.app.tasks[name].delay(1)

        self.pick, self.pack, self.total, self.refuse, self.order = pick, pack, total, refuse, order

    def steps(self, flow: FlowHandle[Any]) -> list[FlowStep]:
        return self.bench.store.list_steps(flow.id)

    def told(self, flow: FlowHandle[Any]) -> list[str]:
        """Each step as "task status", oldest first."""
        return [f"{step.task.removeprefix('shop.')} {step.status}" for step in self.steps(flow)]


@pytest.fixture
def shop(make_bench: MakeBench) -> Iterator[Shop]:
    bench = make_bench(mirror=True)
    bench.app.conf.result_backend = "cache+memory://"
    observer = Observer(bench.runtime)
    observer.connect()
    yield Shop(bench)
    observer.disconnect()


def test_a_chain_is_planned_before_it_runs_and_shown_as_it_goes(shop: Shop) -> None:
    canvas = chain(shop.pick.s(2), shop.pack.s(), shop.pick.s())
    result, flow = shop.flows.mirror(canvas, goal="two boxes", owner="tenant:acme").apply_async()

    stored = flow.get()
    assert (stored.mode, stored.status, stored.goal) == (FlowMode.MIRRORED, FlowStatus.RUNNING, "two boxes")
    assert (stored.controller_id, stored.owner_session_key) == ("shop.pick", "tenant:acme")
    assert shop.told(flow) == ["pick pending", "pack pending", "pick pending"]
    shop.consumer.run_next()
    assert shop.told(flow) == ["pick succeeded", "pack pending", "pick pending"]
    shop.consumer.run_all()
    assert shop.told(flow) == ["pick succeeded", "pack succeeded", "pick succeeded"]
    assert flow.status() is FlowStatus.FINISHED
    assert result.get(timeout=1) == 2
    steps = shop.steps(flow)
    assert steps[-1].run_id == result.id
    assert {step.runtime for step in steps} == {StepRuntime.MIRRORED}
    assert [step.args_json for step in steps] == [{"parent_id": None}, *({"parent_id": s.run_id} for s in steps[:2])]
    assert [step.result_json for step in steps] == [None, None, None]
    assert "options" not in canvas.tasks[0] or not canvas.tasks[0].options  # the user's own is as it was


def test_a_step_runs_while_its_task_does(shop: Shop) -> None:
    seen: list[str] = []

    @shop.bench.task("shop.look")
    def look() -> None:
        seen.extend(shop.told(flow))

    _, flow = shop.flows.mirror(look.si()).delay()
    shop.consumer.run_all()
    assert seen == ["look running"]
    assert flow.status() is FlowStatus.FINISHED


def test_a_group_is_over_when_its_last_member_is(shop: Shop) -> None:
    result, flow = shop.flows.mirror(group(shop.pick.s(n) for n in range(3))).apply_async()
    for _ in range(3):
        assert flow.status() is FlowStatus.RUNNING
        shop.consumer.run_next()
    assert flow.status() is FlowStatus.FINISHED
    assert result.get(timeout=1) == [0, 1, 2]
    assert {step.run_id for step in shop.steps(flow)} == {member.id for member in result.results}


def test_a_chord_goes_on_to_its_body(shop: Shop) -> None:
    result, flow = shop.flows.mirror(chord([shop.pick.s(1), shop.pick.s(2)], shop.total.s())).apply_async()
    assert shop.told(flow) == ["pick pending", "pick pending", "total pending"]
    shop.consumer.run_next()
    shop.consumer.run_next()
    assert (flow.status(), shop.told(flow)[-1]) == (FlowStatus.RUNNING, "total pending")
    shop.consumer.run_all()
    assert flow.status() is FlowStatus.FINISHED
    assert result.get(timeout=1) == 3
    assert {step.run_id for step in shop.steps(flow)} == {result.id, *(m.id for m in result.parent.results)}


def test_a_deep_canvas_has_each_task_once(shop: Shop) -> None:
    parts = group(chain(shop.pick.si(1), shop.pick.s()), chord([shop.pick.si(2), shop.pick.si(3)], shop.total.s()))
    canvas = shop.pick.s(0) | shop.pick.si(5) | parts | shop.total.s() | shop.pick.s()
    result, flow = shop.flows.mirror(canvas).apply_async()
    planned = {step.run_id for step in shop.steps(flow)}
    shop.consumer.run_all()
    assert result.get(timeout=1) == 6
    assert flow.status() is FlowStatus.FINISHED
    assert {step.run_id for step in shop.steps(flow)} == planned
    assert len(planned) == 9


def test_a_child_that_a_task_publishes_is_added_with_its_parent(shop: Shop) -> None:
    _, flow = shop.flows.mirror(shop.order.s("shop.pick", "shop.pick")).apply_async()
    shop.consumer.run_next()
    assert shop.told(flow) == ["order succeeded", "pick pending", "pick pending"]
    assert flow.status() is FlowStatus.RUNNING
    shop.consumer.run_all()
    order, *children = shop.steps(flow)
    assert [child.args_json for child in children] == [{"parent_id": order.run_id}] * 2
    assert flow.status() is FlowStatus.FINISHED


def test_retries_are_attempts_with_their_errors(shop: Shop) -> None:
    shop.refusals = 2
    _, flow = shop.flows.mirror(shop.pack.s(1)).apply_async()
    shop.consumer.run_next()
    (step,) = shop.steps(flow)
    assert (step.status, step.attempt) == ("pending", 2)
    assert step.error_json == {"type": "Refused", "message": "the box is too small"}
    assert flow.status() is FlowStatus.RUNNING
    shop.consumer.run_all()
    (step,) = shop.steps(flow)
    assert (step.status, step.attempt, step.error_json) == ("succeeded", 3, None)
    assert flow.status() is FlowStatus.FINISHED


def test_a_chain_that_fails_fails_its_flow_and_the_rest_is_cancelled(shop: Shop) -> None:
    _, flow = shop.flows.mirror(chain(shop.pick.s(1), shop.refuse.s(), shop.pick.si(2))).apply_async()
    shop.consumer.run_all()
    assert shop.told(flow) == ["pick succeeded", "refuse failed", "pick cancelled"]
    stored = flow.get()
    assert (stored.status, stored.state_json["failure"]["reason"]) == (FlowStatus.FAILED, "step_failed")
    assert stored.error_json == {"type": "Refused", "message": "no"}


def test_a_chord_waits_for_all_of_its_header_before_it_has_failed(shop: Shop) -> None:
    _, flow = shop.flows.mirror(chord([shop.refuse.s(), shop.pick.s(1)], shop.total.s())).apply_async()
    shop.consumer.run_next()
    assert (flow.status(), shop.told(flow)[0]) == (FlowStatus.RUNNING, "refuse failed")
    shop.consumer.run_all()
    assert shop.told(flow) == ["refuse failed", "pick succeeded", "total cancelled"]
    assert flow.status() is FlowStatus.FAILED


def test_what_is_revoked_is_cancelled(shop: Shop) -> None:
    result, flow = shop.flows.mirror(chain(shop.pick.s(1), shop.pick.s())).apply_async()
    assert result.parent is not None
    shop.consumer.revoke(result.parent.id)
    shop.consumer.run_all()
    assert shop.told(flow) == ["pick cancelled", "pick cancelled"]
    assert flow.status() is FlowStatus.CANCELLED


def test_a_flow_that_is_cancelled_has_its_open_tasks_revoked(shop: Shop) -> None:
    _, flow = shop.flows.mirror(group(shop.pick.s(1), shop.pick.s(2))).apply_async()
    shop.consumer.run_next()
    flow.cancel()
    shop.bench.sweep()
    assert flow.status() is FlowStatus.CANCELLED
    assert shop.told(flow) == ["pick succeeded", "pick cancelled"]
    shop.consumer.run_all()  # the revoke goes to workers, not to these hands: what runs all the same changes nothing
    assert shop.told(flow) == ["pick succeeded", "pick cancelled"]


def test_mirroring_that_is_off_is_said_before_anything_is_applied(make_bench: MakeBench) -> None:
    bench = make_bench()
    shop = Shop(bench)
    with pytest.raises(InvalidData, match=r"flow_mirror: .*set flow_mirror = True"):
        bench.flows.mirror(shop.pick.s(1)).delay()
    assert bench.messages() == []
