"""What a flow is told stays in its database: no log shows it, and nothing that Flower shows either."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from urllib.request import urlopen
from uuid import UUID

import pytest

from celery_flows import FlowStatus
from tests.acceptance.conftest import MakeTown, Town
from tests.support.brokers import Broker
from tests.support.commandline import CELERY, ROOT, Background, Project
from tests.support.faults import closed_port
from tests.support.scrape import ANY, PORT, ask, await_value, scrape
from tests.support.shop import CONF
from tests.support.tracing import INSTRUMENTED, SPANS, read_spans
from tests.support.waiting import until

SECRET = "hunter2"
EVENTS = {"worker_send_task_events": True, "task_send_sent_event": True}
BEAT_SCHEDULE = {"often": {"task": "flows.sweep", "schedule": 1}}
TABLE = "/tasks/datatable?draw=1&start=0&length=100&order[0][column]=0&columns[0][data]=name"
PAGES = ("/", "/workers", "/tasks", "/broker", "/metrics", "/api/workers", "/api/tasks", "/api/task/types")


class Watched:
    """A town with Flower and beat beside its worker, all of which say as much as they can."""

    def __init__(self, town: Town, stack: ExitStack) -> None:
        self.town = town
        town.shop.app.conf.update(EVENTS)
        town.environment[CONF] = json.dumps({**EVENTS, "beat_schedule": BEAT_SCHEDULE})
        self._project = Project(ROOT, {**town.environment, "FLOWER_UNAUTHENTICATED_API": "1"})
        self._stack = stack
        port = closed_port()
        self._url = f"http://127.0.0.1:{port}"
        self.flower = self._start("flower", f"--port={port}", "--address=127.0.0.1", "--logging=debug")
        schedule = f"--schedule={town.directory / 'schedule'}"
        self.beat = self._start("beat", schedule, "--pidfile=", "--loglevel=DEBUG", "--max-interval=1")
        self.spans = town.directory / "spans.jsonl"
        town.environment |= {PORT: ANY, "FLOW_TRACING": "1", SPANS: str(self.spans), INSTRUMENTED: "yes"}
        self.worker = town.worker("-E", "--loglevel", "DEBUG")
        self.beat.wait_for("beat: Starting")
        self.flower.wait_for("Visit me at")
        until(self.workers, "Flower gets the worker's events", within_seconds=30)

    def _start(self, name: str, *options: str) -> Background:
        command = (*CELERY, "-A", "tests.support.shop_worker", name, *options)
        return self._stack.enter_context(self._project.started(*command, log=self.town.directory / f"{name}.log"))

    def workers(self) -> list[str]:
        """The workers that Flower has heard of."""
        return [each["hostname"] for each in json.loads(self.ask("/workers?json=1"))["data"]]

    def ask(self, path: str) -> str:
        """What Flower answers."""
        with urlopen(self._url + path, timeout=10) as answer:
            text: str = answer.read().decode()
        return text

    def tasks(self) -> dict[str, Any]:
        """The tasks that Flower knows, by id."""
        known: dict[str, Any] = json.loads(self.ask("/api/tasks"))
        return known

    def everything_flower_shows(self) -> dict[str, str]:
        """Its pages, its task table and its API, by path."""
        workers = [f"/worker/{name}" for name in self.workers()]
        tasks = [f"{page}/{task}" for page in ("/task", "/api/task/info") for task in self.tasks()]
        assert len(workers) == 1
        return {path: self.ask(path) for path in (*PAGES, *workers, TABLE, *tasks)}


@pytest.fixture
def watched(make_town: MakeTown, redis_server: Broker) -> Iterator[Watched]:
    with ExitStack() as stack:
        yield Watched(make_town(redis_server.url), stack)


def stored(town: Town, flow_id: UUID) -> dict[str, str]:
    """What the database has of a flow, part by part, as text."""
    store = town.shop.flows.store
    flow = store.get(flow_id)
    assert flow is not None
    steps = {step.task: step.model_dump_json() for step in store.list_steps(flow_id)}
    history = "".join(event.model_dump_json() for event in store.list_events(flow_id, None))
    return {"input": str(flow.input_json), "error": str(flow.error_json), "history": history, **steps}


def test_a_secret_is_nowhere_but_in_the_database(watched: Watched) -> None:
    town = watched.town
    handle = town.shop.private.start(SECRET)
    town.shop.flows.emit("letter", "private", SECRET)
    until(lambda: handle.status() is FlowStatus.FAILED, "the flow has failed", within_seconds=30)
    kept = stored(town, handle.id)
    assert set(kept) == {"input", "error", "history", "shop.echo", "shop.refuse", "fail", "wait_for letter"}
    assert [part for part, text in kept.items() if SECRET not in text] == []

    celery_steps = [
        step.run_id for step in town.shop.flows.store.list_steps(handle.id) if step.task.startswith("shop.")
    ]
    messages = [str(handle.id), *celery_steps]

    def ended() -> bool:
        known = watched.tasks()
        return all(message in known and known[message]["state"] == "SUCCESS" for message in messages)

    until(ended, "Flower shows the flow and its two Celery steps", within_seconds=20)
    shown = watched.everything_flower_shows()
    for message in messages:
        told = {path for path, text in shown.items() if message in text}
        assert {TABLE, "/api/tasks", f"/task/{message}", f"/api/task/info/{message}"} <= told
    assert [path for path, text in shown.items() if SECRET in text] == []
    until(lambda: "Sending due task" in watched.beat.output, "beat says something", within_seconds=30)
    logs = {"worker": watched.worker.output, "beat": watched.beat.output, "flower": watched.flower.output}
    assert all(message in logs["worker"] for message in messages)
    assert [name for name, log in logs.items() if SECRET in log] == []


def test_a_secret_is_in_no_metric_and_no_span(watched: Watched) -> None:
    """Whatever a flow is told, and whatever its errors say of it."""
    town = watched.town
    handle = town.shop.private.start(SECRET, goal=SECRET, key=SECRET)
    town.shop.flows.emit("letter", "private", SECRET)
    until(lambda: handle.status() is FlowStatus.FAILED, "the flow has failed", within_seconds=30)
    await_value(watched.worker, 1, "flows_ended_total", definition="shop/private", status="failed")

    spans = [span for span in read_spans(watched.spans) if span.name.startswith("flow.")]
    assert {"LookupError", "ValueError"} & {span.attributes.get("error.type") for span in spans}
    told = {"metrics": scrape(watched.worker).text, "ready": ask(watched.worker, "/readyz")[1]}
    told |= {"spans": watched.spans.read_text()}
    assert "flow.step fail" in told["spans"]
    assert 'step="fail"' in told["metrics"]
    assert [name for name, text in told.items() if SECRET in text] == []
