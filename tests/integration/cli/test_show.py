"""``flow show``."""

from __future__ import annotations

import json
import re
from typing import Any
from uuid import UUID, uuid4

from celery_flows import FlowManager, SqlFlowStore
from celery_flows.store import Flow, FlowStep, FlowStepStatus, limits
from celery_flows.store import operations as op
from celery_flows.store.changes import Drive
from tests.integration.cli.shop import a_flow
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


def test_show_keeps_payloads_to_itself_until_it_is_asked(project: Project, store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    flow_id = a_flow(manager, state_json={"card": "hunter2"}, input_json="hunter2")
    manager.record_step_observation(
        flow_id=flow_id, run_id="r1", task="pack", status=FlowStepStatus.SUCCEEDED, result_json="hunter2"
    )
    manager.set_waiting(flow_id, {"kind": "external_event", "topic": "paid", "correlation_id": "o1"})
    project.done("emit", "paid", "o1", '"hunter2"')

    for arguments in (["show", str(flow_id)], ["list"], ["show", str(a_child(manager, flow_id))]):
        assert "hunter2" not in project.done(*arguments) + project.done(*arguments, "--json")
    asked = project.done("show", str(flow_id), "--payloads"), project.done("show", str(flow_id), "--payloads", "--json")
    assert ["hunter2" in each for each in asked] == [True, True]


def a_child(manager: FlowManager, parent: UUID) -> UUID:
    return a_flow(manager, "orders/pack", parent_flow_id=parent, state_json={"card": "hunter2"})


def test_show_tells_of_errors_children_and_who_is_at_work(project: Project, store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    parent = UUID(project.done("start", "shop/wait", '"o1"').strip())
    child = a_child(manager, parent)
    manager.start_running(parent)
    told = {"type": "PrinterError", "message": "no paper"}
    store.insert_step(
        FlowStep(flow_id=parent, run_id="r1", task="pack", status=FlowStepStatus.FAILED, attempt=3, error_json=told)
    )

    shown = [line.split("\t") for line in project.done("show", str(parent)).splitlines()]

    assert [row[1:4] + row[6:] for row in shown if row[1:2] == ["pack"]] == [
        ["pack", "failed", "3", "PrinterError: no paper"]
    ]
    assert [str(child), "orders/pack", "running"] in [row[:3] for row in shown]
    (work,) = (row for row in shown if row[1:2] == ["drive"])
    assert (work[0], work[2:4]) == ("1", ["shop/wait", "celery"])
    assert work[4].startswith(("published once", "due"))


def test_show_tells_why_a_step_was_tried_again(served: Project) -> None:
    flow_id = served.flow("start", "shop/print", "--wait", "30").stderr.split()[2]

    told = [line.split("\t")[2:] for line in served.done("show", flow_id).splitlines() if line.count("\t") == 3]

    (again,) = (about for kind, about in (row for row in told if row[:1] == ["step_retrying"]))
    assert again.startswith("jam, attempt 2, RuntimeError: no paper, again at 20")
    assert ["step_failed", "jam, RuntimeError: no paper"] in told


ANYTHING: list[dict[str, Any]] = [
    {}, {"set": 3}, {"step": "pack"}, {"run_id": {"a": 1}}, {"run_id": "nobody"}, {"worker": 5}, {"topic": "hunter2"},
    {"countdown": "soon"}, {"eta": "later"}, {"continues": "hunter2"}, {"reason": ["hunter2"]},
    {"step": {"attempt": "x", "error_json": 3}}, {"set": {"wait_json": {"kind": "timer"}}},
]  # fmt: skip


def test_an_event_that_somebody_appended_can_be_shown_whatever_it_carries(
    project: Project, store: SqlFlowStore
) -> None:
    flow_id = a_flow(FlowManager(store))
    for kind in ("noted", "created", "waiting", "resumed", "step_started", "step_retrying", "failed"):
        for payload in ANYTHING:
            store.append_event(flow_id, kind, payload)

    for arguments in (["show", str(flow_id)], ["tail", str(flow_id), "--events", "200"]):
        FlowManager(store).finish(flow_id) if arguments[0] == "tail" else None
        for more in ([], ["--json"]):
            shown = project.flow(*arguments, *more)
            assert (shown.returncode, "Traceback" in shown.stderr) == (0, False)
            assert shown.stdout.count("step_retrying") == len(ANYTHING)


def test_show_of_many_steps_shows_the_last_and_counts_them_all(project: Project, store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    flow_id = a_flow(manager)
    for number in range(5):
        status = FlowStepStatus.SUCCEEDED if number else FlowStepStatus.RUNNING
        manager.record_step_observation(flow_id=flow_id, run_id=str(number), task=f"pack {number}", status=status)

    shown = project.flow("show", str(flow_id), "--steps", "2", "--events", "2")

    assert "Steps, the last 2 of 5: 1 running, 4 succeeded" in shown.stdout.splitlines()
    assert [line.split("\t")[1] for line in shown.stdout.splitlines() if re.match(r"\tpack \d\tsucceeded", line)] == [
        "pack 3",
        "pack 4",
    ]
    assert shown.stderr == "there is more before that: --events shows it\n"


def test_show_tells_for_how_long_a_flow_is_kept(project: Project, store: SqlFlowStore) -> None:
    flow_id = a_flow(FlowManager(store), retain_seconds=90 * 86_400)

    assert "kept after its end\t90 d 0 h" in project.done("show", str(flow_id)).splitlines()


def test_show_tells_the_id_of_a_trace_and_not_how_it_is_carried(project: Project, store: SqlFlowStore) -> None:
    trace, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    flow_id = a_flow(FlowManager(store), trace_json={"traceparent": f"00-{trace}-{span}-01", "tracestate": "a=b"})
    table = project.done("show", str(flow_id))
    flow = json.loads(project.done("show", str(flow_id), "--json", "--payloads"))["flow"]

    assert f"trace\t{trace}" in table.splitlines()
    assert flow["trace_id"] == trace
    assert "trace_json" not in flow
    assert span not in table


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
