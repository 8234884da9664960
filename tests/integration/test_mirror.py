"""Canvases that Celery runs as ever, seen as flows: what is shown of each kind, and when the flow is over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from celery import Task, chain, chord, group
from celery.exceptions import Ignore, Reject

from celery_flows import FlowFailed, FlowStatus, InvalidData, StoreError
from celery_flows.store import FlowMode, SqlFlowStore, StepRuntime
from celery_flows.store.engines import make_engine
from celery_flows.store.tables import flows
from tests.integration.conftest import MakeBench
from tests.integration.mirrored import MirroredShop
from tests.support.bench import Bench


@pytest.fixture
def shop(make_bench: MakeBench) -> Iterator[MirroredShop]:
    made = MirroredShop(make_bench(mirror=True))
    with made.observed():
        yield made


def test_a_chain_is_planned_before_it_runs_and_shown_as_it_goes(shop: MirroredShop) -> None:
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


def test_a_step_runs_while_its_task_does(shop: MirroredShop) -> None:
    seen: list[str] = []

    @shop.bench.task("shop.look")
    def look() -> None:
        seen.extend(shop.told(flow))

    _, flow = shop.flows.mirror(look.si()).delay()
    shop.consumer.run_all()
    assert seen == ["look running"]
    assert flow.status() is FlowStatus.FINISHED


def test_a_group_is_over_when_its_last_member_is(shop: MirroredShop) -> None:
    result, flow = shop.flows.mirror(group(shop.pick.s(n) for n in range(3))).apply_async()
    for _ in range(3):
        assert flow.status() is FlowStatus.RUNNING
        shop.consumer.run_next()
    assert flow.status() is FlowStatus.FINISHED
    assert result.get(timeout=1) == [0, 1, 2]
    assert {step.run_id for step in shop.steps(flow)} == {member.id for member in result.results}


def test_a_chord_goes_on_to_its_body(shop: MirroredShop) -> None:
    result, flow = shop.flows.mirror(chord([shop.pick.s(1), shop.pick.s(2)], shop.total.s())).apply_async()
    assert shop.told(flow) == ["pick pending", "pick pending", "total pending"]
    shop.consumer.run_next()
    shop.consumer.run_next()
    assert (flow.status(), shop.told(flow)[-1]) == (FlowStatus.RUNNING, "total pending")
    shop.consumer.run_all()
    assert flow.status() is FlowStatus.FINISHED
    assert result.get(timeout=1) == 3
    assert {step.run_id for step in shop.steps(flow)} == {result.id, *(m.id for m in result.parent.results)}


def test_a_deep_canvas_has_each_task_once(shop: MirroredShop) -> None:
    parts: Any = group(chain(shop.pick.si(1), shop.pick.s()), chord([shop.pick.si(2), shop.pick.si(3)], shop.total.s()))
    canvas: Any = shop.pick.s(0) | shop.pick.si(5) | parts | shop.total.s() | shop.pick.s()
    result, flow = shop.flows.mirror(canvas).apply_async()
    planned = {step.run_id for step in shop.steps(flow)}
    shop.consumer.run_all()
    assert result.get(timeout=1) == 6
    assert flow.status() is FlowStatus.FINISHED
    assert {step.run_id for step in shop.steps(flow)} == planned
    assert len(planned) == 9


def test_a_child_that_a_task_publishes_is_added_with_its_parent(shop: MirroredShop) -> None:
    _, flow = shop.flows.mirror(shop.order.s("shop.pick", "shop.pick")).apply_async()
    shop.consumer.run_next()
    assert shop.told(flow) == ["order succeeded", "pick pending", "pick pending"]
    assert flow.status() is FlowStatus.RUNNING
    shop.consumer.run_all()
    order, *children = shop.steps(flow)
    assert [child.args_json for child in children] == [{"parent_id": order.run_id}] * 2
    assert flow.status() is FlowStatus.FINISHED


def test_retries_are_attempts_with_their_errors(shop: MirroredShop) -> None:
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


def test_a_chain_that_fails_fails_its_flow_and_the_rest_is_cancelled(shop: MirroredShop) -> None:
    _, flow = shop.flows.mirror(chain(shop.pick.s(1), shop.refuse.s(), shop.pick.si(2))).apply_async()
    shop.consumer.run_all()
    assert shop.told(flow) == ["pick succeeded", "refuse failed", "pick cancelled"]
    stored: Any = flow.get()
    assert (stored.status, stored.state_json["failure"]["reason"]) == (FlowStatus.FAILED, "step_failed")
    assert stored.error_json == {"type": "Refused", "message": "no"}


def test_a_chord_waits_for_all_of_its_header_before_it_has_failed(shop: MirroredShop) -> None:
    _, flow = shop.flows.mirror(chord([shop.refuse.s(), shop.pick.s(1)], shop.total.s())).apply_async()
    shop.consumer.run_next()
    assert (flow.status(), shop.told(flow)[0]) == (FlowStatus.RUNNING, "refuse failed")
    shop.consumer.run_all()
    assert shop.told(flow) == ["refuse failed", "pick succeeded", "total cancelled"]
    assert flow.status() is FlowStatus.FAILED


def test_what_is_revoked_is_cancelled(shop: MirroredShop) -> None:
    _, flow = shop.flows.mirror(chain(shop.pick.s(1), shop.pick.s())).apply_async()
    shop.consumer.revoke(shop.steps(flow)[0].run_id)
    shop.consumer.run_all()
    assert shop.told(flow) == ["pick cancelled", "pick cancelled"]
    assert flow.status() is FlowStatus.CANCELLED


def test_a_flow_that_is_cancelled_has_its_open_tasks_revoked(shop: MirroredShop) -> None:
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
    shop = MirroredShop(bench)
    with pytest.raises(InvalidData, match=r"flow_mirror: .*set flow_mirror = True"):
        bench.flows.mirror(shop.pick.s(1)).delay()
    assert bench.messages() == []


def test_a_key_applies_a_canvas_once(shop: MirroredShop) -> None:
    canvas = chord([shop.pick.s(1), shop.pick.s(2)], shop.total.s())
    mirror = shop.flows.mirror(canvas, name="shop/total", key="november")
    first, flow = mirror.apply_async()
    shop.consumer.run_all()
    again, same = mirror.apply_async()
    assert shop.bench.messages() == []
    assert (same.id, again.id, again.get(timeout=1)) == (flow.id, first.id, 3)
    assert [member.id for member in again.parent.results] == [member.id for member in first.parent.results]


def test_without_a_key_each_application_is_a_flow_of_its_own(shop: MirroredShop) -> None:
    mirror = shop.flows.mirror(chain(shop.pick.s(1), shop.pick.s()))
    made = [mirror.delay() for _ in range(2)]
    shop.consumer.run_all()
    assert len({flow.id for _, flow in made}) == 2
    assert [flow.status() for _, flow in made] == [FlowStatus.FINISHED] * 2


def test_what_a_canvas_is_applied_with_reaches_its_tasks(shop: MirroredShop) -> None:
    seen: list[Any] = []

    @shop.bench.task("shop.see", bind=True)
    def see(self: Task[Any, Any], *args: int, **kwargs: int) -> None:
        seen.append((args, kwargs, (self.request.headers or {})["tenant"], self.request.id))

    result, flow = shop.flows.mirror(see.s(2)).apply_async(
        (1,), {"three": 3}, task_id="an id of my own", headers={"tenant": "acme"}
    )
    shop.consumer.run_all()
    assert seen == [((1, 2), {"three": 3}, "acme", result.id)]
    assert result.id == "an id of my own"
    assert flow.status() is FlowStatus.FINISHED


def test_what_cannot_be_published_has_failed(shop: MirroredShop) -> None:
    with pytest.raises(TypeError):
        shop.flows.mirror(shop.pick.s(), name="no argument").delay()
    (row,) = shop.bench.query(flows.select())
    assert (row.status, row.state_json["failure"]["reason"]) == (FlowStatus.FAILED, "not_published")


@pytest.mark.parametrize("canvas", [None, "shop.pick", 3])
def test_what_is_no_canvas_is_refused(shop: MirroredShop, canvas: Any) -> None:
    with pytest.raises(InvalidData, match="canvas: must be a signature, chain, group or chord"):
        shop.flows.mirror(canvas)


def test_an_empty_canvas_is_refused(shop: MirroredShop) -> None:
    with pytest.raises(InvalidData, match="canvas: has no tasks"):
        shop.flows.mirror(group()).delay()


def test_chunks_are_a_group(shop: MirroredShop) -> None:
    chunks: Any = shop.pick.chunks([(n,) for n in range(4)], 2)
    result, flow = shop.flows.mirror(chunks).apply_async()
    shop.consumer.run_all()
    assert result.get(timeout=1) == [[0, 1], [2, 3]]
    assert (shop.told(flow), flow.status()) == (["celery.starmap succeeded"] * 2, FlowStatus.FINISHED)
    with pytest.raises(InvalidData, match=r"use chunks\(…\)\.group\(\)"):
        shop.flows.mirror(chain(shop.pick.s(1), chunks)).apply_async()


def test_a_task_that_replaces_itself_is_over_when_its_replacement_is(shop: MirroredShop) -> None:
    @shop.bench.task("shop.replaced", bind=True)
    def replaced(self: Task[Any, Any]) -> None:
        raise self.replace(chain(shop.pick.s(1), shop.pick.s()))

    result, flow = shop.flows.mirror(chain(replaced.si(), shop.pick.s())).apply_async()
    shop.consumer.run_next()
    assert flow.status() is FlowStatus.RUNNING
    shop.consumer.run_all()
    assert result.get(timeout=1) == 1
    assert flow.status() is FlowStatus.FINISHED
    assert {step.status for step in shop.steps(flow)} == {"succeeded"}


@pytest.mark.parametrize(
    ("error", "told"), [(Ignore(), "cancelled"), (Reject("no", requeue=False), "failed"), (KeyError("k"), "failed")]
)
def test_a_task_that_ends_some_other_way_ends_its_chain(shop: MirroredShop, error: Exception, told: str) -> None:
    @shop.bench.task("shop.end")
    def end() -> None:
        raise error

    _, flow = shop.flows.mirror(chain(end.si(), shop.pick.si(1))).apply_async()
    shop.consumer.run_all()
    assert shop.told(flow) == [f"end {told}", "pick cancelled"]
    assert flow.status() == told


def test_a_task_that_is_ignored_and_leads_nowhere_has_succeeded(shop: MirroredShop) -> None:
    @shop.bench.task("shop.ignore")
    def ignore() -> None:
        raise Ignore

    _, flow = shop.flows.mirror(ignore.si()).apply_async()
    shop.consumer.run_all()
    assert (shop.told(flow), flow.status()) == (["ignore succeeded"], FlowStatus.FINISHED)


def test_a_result_that_cannot_be_stored_has_failed_as_celery_takes_it(shop: MirroredShop) -> None:
    @shop.bench.task("shop.odd")
    def odd() -> object:
        return object()

    _, flow = shop.flows.mirror(chain(odd.si(), shop.pick.si(1))).apply_async()
    shop.consumer.run_all()
    assert shop.told(flow) == ["odd failed", "pick succeeded"]  # Celery publishes what follows before it stores
    with pytest.raises(FlowFailed):
        flow.result(0)


def test_callbacks_and_errbacks_are_steps_too(shop: MirroredShop) -> None:
    _, flow = shop.flows.mirror(shop.pick.s(1).on_error(shop.pick.si(9))).apply_async(link=shop.pack.s())
    shop.consumer.run_all()
    assert shop.told(flow) == ["pick succeeded", "pack succeeded"]
    _, failed = shop.flows.mirror(shop.refuse.s().on_error(shop.pack.si(9))).apply_async()
    shop.consumer.run_all()
    assert shop.told(failed) == ["refuse failed", "pack succeeded"]
    assert (flow.status(), failed.status()) == (FlowStatus.FINISHED, FlowStatus.FAILED)


def test_nothing_of_what_tasks_are_called_with_or_return_is_recorded(shop: MirroredShop) -> None:
    @shop.bench.task("shop.secret")
    def secret(text: str) -> str:
        return text

    _, flow = shop.flows.mirror(chain(secret.s("hunter2"), secret.s())).apply_async()
    shop.consumer.run_all()
    assert flow.status() is FlowStatus.FINISHED
    assert "hunter2" not in str([shop.bench.query(table.select()) for table in flows.metadata.sorted_tables])


def test_with_the_database_away_a_canvas_is_applied_and_not_mirrored() -> None:
    url = "postgresql+psycopg://nobody@127.0.0.1:1/nowhere"
    with closing(Bench(url, store=SqlFlowStore(make_engine(url), check=False), mirror=True)) as bench:
        shop = MirroredShop(bench)
        shop.flows.mirror(shop.pick.s(1)).delay()
        with pytest.raises(StoreError):
            shop.flows.mirror(shop.pick.s(1), key="k").delay()
        assert len(bench.messages()) == 1


@pytest.mark.parametrize("kind", ["task", "chain", "group", "chord", "failure", "child"])
def test_tasks_that_run_eagerly_are_mirrored_too(make_bench: MakeBench, kind: str) -> None:
    """As in the tests of an application; no worker is there to tell."""
    bench = make_bench(mirror=True)
    shop = MirroredShop(bench)
    bench.app.conf.update(task_always_eager=True, task_store_eager_result=False)
    canvases: dict[str, Any] = {
        "task": shop.pick.s(1),
        "chain": chain(shop.pick.s(1), shop.pick.s(), shop.pick.s()),
        "group": group(shop.pick.s(1), shop.pick.s(2)),
        "chord": chord([shop.pick.s(1), shop.pick.s(2)], shop.total.s()),
        "failure": group(shop.refuse.s(), shop.pick.s(1)),
        "child": shop.order.s("shop.pick"),
    }
    _, flow = shop.flows.mirror(canvases[kind]).apply_async()
    assert flow.status() == ("failed" if kind == "failure" else "finished")
    told = shop.told(flow)
    assert len(told) == {"task": 1, "chain": 3, "group": 2, "chord": 3, "failure": 2, "child": 1}[kind]
