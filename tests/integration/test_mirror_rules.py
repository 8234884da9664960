"""Root tasks that are mirrored by their names; and what never is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Task, chain, chord, group, signals

from celery_flows import FlowNotFound, FlowStatus, InvalidData, Run
from celery_flows.store import StepRuntime
from celery_flows.store.tables import flows
from tests.integration.conftest import MakeBench
from tests.integration.mirrored import MirroredShop
from tests.support.bench import Bench


@pytest.fixture
def shop(make_bench: MakeBench) -> Iterator[MirroredShop]:
    made = MirroredShop(make_bench())
    made.flows.mirror_rule("shop.*", goal="what the shop does", owner="tenant:shop")
    with made.observed():
        yield made


def count_flows(bench: Bench) -> int:
    return len(bench.query(flows.select()))


def test_a_root_task_that_anybody_sends_is_mirrored_from_its_start(shop: MirroredShop) -> None:
    sent = shop.bench.app.send_task("shop.order", ["shop.pick"])
    with pytest.raises(FlowNotFound):
        shop.flows.mirrored(sent.id).get()
    shop.consumer.run_all()
    flow = shop.flows.mirrored(sent.id)
    stored = flow.get()
    assert (stored.status, stored.controller_id) == (FlowStatus.FINISHED, "shop.order")
    assert (stored.goal, stored.owner_session_key) == ("what the shop does", "tenant:shop")
    order, pick = shop.steps(flow)
    assert (order.run_id, pick.args_json) == (sent.id, {"parent_id": sent.id})
    assert shop.told(flow) == ["order succeeded", "pick succeeded"]
    assert count_flows(shop.bench) == 1  # the child's name matches, and it is no root


def test_what_follows_a_root_task_is_planned_when_it_starts(shop: MirroredShop) -> None:
    result = chain(shop.pick.s(1), shop.pick.s(), group(shop.pick.s(), shop.pick.s()) | shop.total.s()).apply_async()
    root: Any = result
    while root.parent is not None:
        root = root.parent
    shop.consumer.run_next()
    flow = shop.flows.mirrored(root.id)
    assert shop.told(flow) == [
        "pick succeeded", "pick pending", "pick pending", "pick pending", "total pending",
    ]  # fmt: skip
    shop.consumer.run_all()
    assert result.get(timeout=1) == 2
    assert flow.status() is FlowStatus.FINISHED


def test_a_chord_within_a_task_belongs_to_its_flow(shop: MirroredShop) -> None:
    @shop.bench.task("shop.fan")
    def fan() -> None:
        chord([shop.pick.s(1), shop.pick.s(2)], shop.total.s()).apply_async()

    sent = fan.delay()
    shop.consumer.run_next()
    flow = shop.flows.mirrored(sent.id)
    assert sorted(shop.told(flow)) == ["fan succeeded", "pick pending", "pick pending", "total pending"]
    shop.consumer.run_all()
    assert sorted(shop.told(flow)) == ["fan succeeded", "pick succeeded", "pick succeeded", "total succeeded"]
    assert flow.status() is FlowStatus.FINISHED


def test_a_root_task_that_is_tried_again_is_one_flow(shop: MirroredShop) -> None:
    shop.refusals = 1
    sent = shop.pack.delay(1)
    shop.consumer.run_all()
    (step,) = shop.steps(shop.flows.mirrored(sent.id))
    assert (step.status, step.attempt) == ("succeeded", 2)
    assert count_flows(shop.bench) == 1


def test_a_message_that_comes_twice_makes_one_flow(shop: MirroredShop) -> None:
    shop.pick.delay(1)
    request = shop.consumer.take()
    assert request is not None
    shop.consumer.run(request)
    shop.consumer.run(request)
    assert count_flows(shop.bench) == 1


def test_a_task_whose_name_matches_no_rule_costs_no_row(make_bench: MakeBench) -> None:
    shop = MirroredShop(make_bench())
    shop.flows.mirror_rule("office.*")
    with shop.observed():
        shop.order.delay("shop.pick")
        shop.consumer.run_all()
    assert count_flows(shop.bench) == 0


def test_steps_of_our_own_are_never_mirrored(make_bench: MakeBench) -> None:
    """Not even by a rule for everything; and what a step's task publishes does not touch the managed flow."""
    bench = make_bench()
    shop = MirroredShop(bench)
    bench.flows.mirror_rule("*")

    @bench.flows.flow("shop/managed")
    def managed(run: Run) -> int:
        run.step(shop.order, "shop.pick")
        picked: int = run.step(shop.pick, 3)
        return picked

    with shop.observed():
        handle = managed.start()
        shop.consumer.run_all()  # flows.drive and flows.step, as messages
        assert bench.finish(handle) == 3
        shop.consumer.run_all()
        assert [step.runtime for step in bench.store.list_steps(handle.id)] == [StepRuntime.MANAGED] * 2
    # The child of a managed step's task is a task of Celery's, and no root.
    assert count_flows(bench) == 1


def test_a_flow_that_a_mirrored_task_starts_is_managed_as_ever(shop: MirroredShop) -> None:
    @shop.flows.flow("shop/started")
    def started(run: Run) -> int:
        picked: int = run.step(shop.pick, 3)
        return picked

    handles: list[Any] = []

    @shop.bench.task("shop.start")
    def start() -> None:
        handles.append(started.start())

    sent = start.delay()
    shop.consumer.run_all()
    assert shop.bench.finish(handles[0]) == 3
    assert shop.told(shop.flows.mirrored(sent.id)) == ["start succeeded"]


def test_a_mirrored_canvas_that_a_mirrored_task_applies_is_a_flow_of_its_own(shop: MirroredShop) -> None:
    inner: list[Any] = []

    @shop.bench.task("shop.apply")
    def apply() -> None:
        inner.append(shop.flows.mirror(shop.pick.s(1)).delay().flow)

    sent = apply.delay()
    shop.consumer.run_all()
    assert shop.told(shop.flows.mirrored(sent.id)) == ["apply succeeded"]
    assert shop.told(inner[0]) == ["pick succeeded"]


def test_another_app_of_this_process_is_not_watched(shop: MirroredShop, make_bench: MakeBench) -> None:
    other = MirroredShop(make_bench())
    other.pick.delay(1)
    other.consumer.run_all()
    assert count_flows(shop.bench) == 0


def test_an_app_that_mirrors_nothing_has_no_handler_of_any_signal(make_bench: MakeBench) -> None:
    watched = [
        signals.task_prerun, signals.task_postrun, signals.task_success, signals.task_failure, signals.task_retry,
        signals.task_revoked, signals.before_task_publish, signals.after_task_publish,
    ]  # fmt: skip

    def handlers() -> int:
        return sum(len(signal.receivers or ()) for signal in watched)

    before = handlers()
    shop = MirroredShop(make_bench())
    shop.pick.delay(1)
    shop.consumer.run_all()
    assert handlers() == before
    with shop.observed():
        assert handlers() > before
    assert handlers() == before


@pytest.mark.parametrize(("pattern", "owner"), [("", "default"), ("shop.*", ""), ("x" * 201, "default")])
def test_a_bad_rule_is_refused(make_bench: MakeBench, pattern: str, owner: str) -> None:
    with pytest.raises(InvalidData):
        make_bench().flows.mirror_rule(pattern, owner=owner)


def test_a_mirror_that_breaks_breaks_no_task(shop: MirroredShop) -> None:
    """A name that no flow can have."""
    done: list[int] = []

    @shop.bench.task("shop." + "x" * 300)
    def long(self: int) -> None:
        done.append(self)

    task: Task[Any, Any] = long
    task.delay(1)
    shop.consumer.run_all()
    assert done == [1]
    assert count_flows(shop.bench) == 0
