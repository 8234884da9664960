"""Canvases that real workers run over real brokers, and what is seen of them: all kinds, and all ways to end."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest
from celery import Signature, chain, chord, group

from celery_flows import FlowHandle, FlowStatus
from celery_flows.store import FlowStep
from celery_flows.store.audit import verify
from celery_flows.tasks.mirror import Mirrored
from tests.acceptance.conftest import MakeTown, Town
from tests.support.brokers import Broker
from tests.support.shop import CONF, MIRRORS
from tests.support.waiting import until

SECONDS = 40.0


class Mirrors:
    """A town whose workers mirror."""

    def __init__(self, town: Town, results: str, **conf: Any) -> None:
        settings = {"flow_mirror": True, "result_backend": results, **conf}
        town.environment[CONF] = json.dumps(settings)
        town.shop.app.conf.update(settings)
        self.town = town

    def task(self, name: str, *args: Any) -> Signature[Any]:
        signature: Signature[Any] = self.town.shop.app.tasks[f"shop.{name}"].si(*args)
        return signature

    def label(self, number: int) -> Signature[Any]:
        return self.task("label", number)

    def bundle(self) -> Signature[Any]:
        signature: Signature[Any] = self.town.shop.app.tasks["shop.bundle"].s()
        return signature

    def apply(self, canvas: Any) -> Mirrored:
        return self.town.shop.flows.mirror(canvas).apply_async()

    def ended(self, flow: FlowHandle[Any]) -> str:
        """How it ended."""
        until(lambda: flow.status().is_terminal, "the flow ends", within_seconds=SECONDS)
        return flow.status().value

    def steps(self, flow: FlowHandle[Any]) -> list[FlowStep]:
        return self.town.shop.flows.store.list_steps(flow.id)

    def told(self, flow: FlowHandle[Any]) -> list[str]:
        """Each step as "task status", in the order of the alphabet."""
        return sorted(f"{step.task.removeprefix('shop.')} {step.status}" for step in self.steps(flow))

    def hold(self, label: str) -> Signature[Any]:
        return self.task("hold", label)

    def until_held(self, label: str) -> None:
        effects = self.town.shop.effects
        until(lambda: effects.counts()[f"{label} began"], f"{label} has begun", within_seconds=SECONDS)

    def audit(self) -> None:
        """As ``celery flow verify`` does."""
        assert [str(finding) for finding in verify(self.town.shop.flows.store)] == []


@pytest.fixture
def mirrors(town: Town, redis_server: Broker) -> Mirrors:
    return Mirrors(town, redis_server.url)


def test_every_kind_of_canvas_is_a_flow_with_a_step_for_each_task(mirrors: Mirrors) -> None:
    canvases = {
        "a task": mirrors.label(0),
        "a chain": chain(mirrors.label(1), mirrors.label(2), mirrors.label(3)),
        "a group": group(mirrors.label(n) for n in (4, 5)),
        "a chord": chord([mirrors.label(6), mirrors.label(7)], mirrors.bundle()),
        "children": mirrors.task("forward", "shop.echo", "one", "two"),
        "a retry": mirrors.task("stumble", "third time"),
        "a failure": chain(mirrors.label(8), mirrors.task("refuse", "no"), mirrors.label(9)),
        "all of it": mirrors.label(10)
        | group(mirrors.label(11), mirrors.task("stumble", "deep"))
        | mirrors.bundle()
        | mirrors.task("forward", "shop.echo", "three"),
    }
    applied = {name: mirrors.apply(canvas) for name, canvas in canvases.items()}
    planned = {name: len(mirrors.steps(flow)) for name, (_, flow) in applied.items()}
    assert list(planned.values()) == [1, 3, 2, 3, 1, 1, 3, 5]
    mirrors.town.worker()

    ends = {name: mirrors.ended(flow) for name, (_, flow) in applied.items()}
    assert ends == {name: "failed" if name == "a failure" else "finished" for name in canvases}
    told = {name: mirrors.told(flow) for name, (_, flow) in applied.items()}
    assert told["a task"] == ["label succeeded"]
    assert told["a chain"] == ["label succeeded"] * 3
    assert told["a group"] == ["label succeeded"] * 2
    assert told["a chord"] == ["bundle succeeded", "label succeeded", "label succeeded"]
    assert told["children"] == ["echo succeeded", "echo succeeded", "forward succeeded"]
    assert told["a retry"] == ["stumble succeeded"]
    assert told["a failure"] == ["label cancelled", "label succeeded", "refuse failed"]
    assert len(told["all of it"]) == 6
    assert applied["a chord"].result.get(timeout=SECONDS) == "label 6+label 7"
    assert [step.attempt for step in mirrors.steps(applied["a retry"].flow)] == [2]
    (failed,) = [step for step in mirrors.steps(applied["a failure"].flow) if step.status == "failed"]
    assert (failed.attempt, failed.error_json) == (2, {"type": "ValueError", "message": "no"})
    mirrors.audit()


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_the_other_pools_mirror_too(make_town: MakeTown, redis_server: Broker, pool: str) -> None:
    mirrors = Mirrors(make_town(redis_server.url), redis_server.url)
    mirrors.town.worker("--pool", pool)
    _, chorded = mirrors.apply(chord([mirrors.label(n) for n in range(8)], mirrors.bundle()))
    _, forwarded = mirrors.apply(mirrors.task("forward", "shop.stumble", "one", "two"))
    assert [mirrors.ended(chorded), mirrors.ended(forwarded)] == ["finished", "finished"]
    assert mirrors.told(chorded) == ["bundle succeeded", *["label succeeded"] * 8]
    assert mirrors.told(forwarded) == ["forward succeeded", "stumble succeeded", "stumble succeeded"]
    mirrors.audit()


def test_what_is_revoked_is_cancelled(mirrors: Mirrors) -> None:
    """A task that waits, and one that runs and is ended."""
    town = mirrors.town
    town.worker("-c", "1")
    held, running = mirrors.apply(chain(mirrors.hold("held"), mirrors.label(1)))
    mirrors.until_held("held")
    waiting_result, waiting = mirrors.apply(group(mirrors.label(2), mirrors.label(3)))
    waiting_result.revoke()
    held.parent.revoke(terminate=True)
    assert mirrors.ended(running) == "cancelled"
    assert mirrors.told(running) == ["hold cancelled", "label cancelled"]
    assert mirrors.ended(waiting) == "cancelled"
    assert mirrors.told(waiting) == ["label cancelled", "label cancelled"]
    assert "label 2" not in town.shop.effects.counts()
    mirrors.audit()


def test_a_flow_that_is_cancelled_has_its_waiting_tasks_revoked(mirrors: Mirrors) -> None:
    town = mirrors.town
    town.worker("-c", "1")
    _, flow = mirrors.apply(group(mirrors.hold("held"), mirrors.label(1), mirrors.label(2)))
    mirrors.until_held("held")
    flow.cancel()
    assert mirrors.ended(flow) == "cancelled"
    town.shop.open_gate()
    _, after = mirrors.apply(mirrors.label(3))
    assert mirrors.ended(after) == "finished"
    assert mirrors.told(flow) == ["hold cancelled", "label cancelled", "label cancelled"]
    assert {"label 1", "label 2"}.isdisjoint(town.shop.effects.counts())
    mirrors.audit()


def test_a_task_whose_process_is_killed_has_failed(mirrors: Mirrors) -> None:
    worker = mirrors.town.worker()
    _, flow = mirrors.apply(chain(mirrors.hold("held"), mirrors.label(1)))
    mirrors.until_held("held")
    for pid in worker.children():
        os.kill(pid, signal.SIGKILL)
    assert mirrors.ended(flow) == "failed"
    assert mirrors.told(flow) == ["hold failed", "label cancelled"]
    assert (flow.get().error_json or {})["type"] == "WorkerLostError"
    mirrors.audit()


def test_a_task_that_runs_past_its_hard_time_limit_has_failed(mirrors: Mirrors) -> None:
    mirrors.town.worker()
    held: Any = mirrors.hold("held")
    _, flow = mirrors.apply(chain(held.set(time_limit=1), mirrors.label(1)))
    assert mirrors.ended(flow) == "failed"
    assert mirrors.told(flow) == ["hold failed", "label cancelled"]
    assert (flow.get().error_json or {})["type"] == "TimeLimitExceeded"
    mirrors.audit()


def test_a_task_whose_worker_is_killed_is_given_up_when_it_was_silent_for_too_long(
    make_town: MakeTown, redis_server: Broker
) -> None:
    """Celery has acknowledged its message, so nobody will ever tell."""
    mirrors = Mirrors(make_town(redis_server.url), redis_server.url, flow_mirror_silent_seconds=8)
    worker = mirrors.town.worker()
    _, flow = mirrors.apply(chain(mirrors.hold("held"), mirrors.label(1)))
    mirrors.until_held("held")
    until(lambda: "hold running" in mirrors.told(flow), "it is seen")
    worker.kill()
    assert (flow.status(), mirrors.told(flow)) == (FlowStatus.RUNNING, ["hold running", "label pending"])
    mirrors.town.worker()
    assert mirrors.ended(flow) == "failed"
    stored = flow.get()
    assert (stored.state_json["failure"]["reason"], (stored.error_json or {})["type"]) == ("lost", "MirrorLost")
    assert mirrors.told(flow) == ["hold cancelled", "label cancelled"]
    mirrors.audit()


def test_a_late_acknowledged_task_whose_worker_is_killed_goes_on(make_town: MakeTown, rabbitmq_server: Broker) -> None:
    """RabbitMQ delivers it again."""
    acks = {"task_acks_late": True, "task_reject_on_worker_lost": True}
    mirrors = Mirrors(make_town(rabbitmq_server.url), "rpc://", **acks)
    worker = mirrors.town.worker()
    _, flow = mirrors.apply(chain(mirrors.hold("held"), mirrors.label(1)))
    mirrors.until_held("held")
    worker.kill()
    mirrors.town.shop.open_gate()
    mirrors.town.worker()
    assert mirrors.ended(flow) == "finished"
    assert mirrors.told(flow) == ["hold succeeded", "label succeeded"]
    mirrors.audit()


def test_a_rule_mirrors_what_a_process_without_flows_sends(mirrors: Mirrors) -> None:
    """The sender knows nothing but Celery; the worker's rule stands in its environment."""
    town = mirrors.town
    town.environment[MIRRORS] = "shop.forward"
    town.worker()
    sent = town.shop.app.send_task("shop.forward", ["shop.stumble", "one"])
    flow = town.shop.flows.mirrored(sent.id)
    until(lambda: town.shop.flows.store.get(flow.id) is not None, "it is seen", within_seconds=SECONDS)
    assert mirrors.ended(flow) == "finished"
    assert mirrors.told(flow) == ["forward succeeded", "stumble succeeded"]
    mirrors.audit()
