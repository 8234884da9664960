"""``flow show``."""

from __future__ import annotations

import json
import re
from uuid import uuid4

from celery_flows import SqlFlowStore
from celery_flows.store import Flow, limits
from celery_flows.store import operations as op
from celery_flows.store.changes import Drive
from tests.support.commandline import CELERY, Project


def test_show_tells_the_whole_story(served: Project) -> None:
    flow_id = served.done("start", "shop/double", "21", "--key", "shown", "--wait", "30").split()[0]

    told = served.done("show", flow_id, "--payloads")
    as_json = json.loads(served.done("show", flow_id, "--json", "--payloads", "--events", "2"))
    code, shown = served.on_terminal(*CELERY, "-A", "shop", "flow", "show", flow_id)

    facts, steps, history = told.split("\n\n")
    assert facts.splitlines()[0] == flow_id
    assert dict(line.split("\t") for line in facts.splitlines()[2:]) | {
        "flow": "shop/double", "status": "finished", "owner": "default", "key": "shown", "input": "21", "result": "42",
    } == dict(line.split("\t") for line in facts.splitlines()[2:])  # fmt: skip
    assert steps.splitlines()[2].split("\t")[:4] == ["1", "twice", "succeeded", "1"]
    kinds = [line.split("\t")[2] for line in history.splitlines()[2:]]
    assert kinds == ["created", "started", "step_succeeded", "finished"]
    assert as_json["flow"]["id"] == flow_id
    assert as_json["flow"]["result_json"] == 42
    assert [step["task"] for step in as_json["steps"]] == ["twice"]
    assert [event["kind"] for event in as_json["events"]] == ["step_succeeded", "finished"]
    assert code == 0
    assert {flow_id, "Steps", "History", "twice"} <= set(re.split(r"\s+|\x1b\[\d*m", shown))


def test_show_tells_of_which_flow_it_is_a_fork(project: Project, store: SqlFlowStore) -> None:
    forked = Flow(controller_id="orders/import", owner_session_key="ada", forked_from=uuid4())
    store.insert(forked)
    assert f"forked from\t{forked.forked_from}" in project.done("show", str(forked.id)).splitlines()


def test_show_tells_that_a_flow_queues_for_a_slot(project: Project, store: SqlFlowStore) -> None:
    queued = Flow(controller_id="orders/import", owner_session_key="ada")
    assert store.run(op.create_flow, queued, {}, Drive("orders/import", limit_key="orders"))
    assert not store.run(limits.admit, queued.id, limits.Bounds(at_once=0), 0, 5.0).has_slot

    assert "queues for a slot\tsince 20" in project.done("show", str(queued.id))
    assert json.loads(project.done("show", str(queued.id), "--json"))["queued_at"].startswith("20")
