"""``flow cancel``, ``pause``, ``resume``, ``emit``: flows are told."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from uuid import UUID

from celery_flows import FlowManager, FlowStatus, SqlFlowStore
from tests.integration.cli.shop import a_flow
from tests.support.commandline import Project


def test_cancel_asks_a_flow_once_and_tells_that_an_ended_one_has_ended(project: Project, store: SqlFlowStore) -> None:
    flow_id = project.done("start", "shop/hello").strip()

    assert project.done("cancel", flow_id) == f"{flow_id} cancel requested\n"
    stored = store.get(UUID(flow_id))
    assert stored is not None
    assert stored.cancel_requested

    FlowManager(store).cancel(UUID(flow_id))
    refused = project.flow("cancel", flow_id)
    assert (refused.returncode, "it has ended" in refused.stderr) == (1, True)


def test_resume_wakes_a_flow_that_waits_and_no_other(project: Project, store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    flow_id = a_flow(manager)
    manager.set_waiting(flow_id, {"kind": "manual"})

    assert project.done("resume", str(flow_id), "--patch", '{"checked": true}') == f"{flow_id} resumed\n"
    resumed = manager.get(flow_id)
    assert (resumed.status, resumed.state_json) == (FlowStatus.RUNNING, {"checked": True})

    refused = project.flow("resume", str(flow_id))
    assert (refused.returncode, "is running and cannot" in refused.stderr) == (1, True)


def test_emit_resumes_who_waits_and_sweep_settles_what_is_due(project: Project, store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    told, timed = a_flow(manager), a_flow(manager)
    manager.set_waiting(told, {"kind": "external_event", "topic": "paid", "correlation_id": "o1"})
    manager.set_waiting(timed, {"kind": "timer", "at": datetime(2020, 1, 1, tzinfo=UTC)})

    project.done("emit", "paid", "o1", '{"cents": 5}')
    assert manager.get(told).state_json["resume_event"] == {"cents": 5}

    assert json.loads(project.done("sweep", "--json"))["settled"] == 1
    assert manager.get(timed).status is FlowStatus.RUNNING
    assert project.done("sweep").splitlines()[0].split("\t")[0] == "due"
