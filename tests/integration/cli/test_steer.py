"""``flow cancel``, ``pause``, ``resume``, ``emit``: flows are told."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import partial
from uuid import UUID

from celery_flows import FlowManager, FlowStatus, SqlFlowStore
from tests.integration.cli.shop import a_flow
from tests.support.commandline import Project
from tests.support.waiting import until


def test_cancel_asks_a_flow_once_and_tells_that_an_ended_one_has_ended(project: Project, store: SqlFlowStore) -> None:
    flow_id = project.done("start", "shop/hello").strip()

    assert project.done("cancel", flow_id) == f"{flow_id} cancel requested\n"
    stored = store.get(UUID(flow_id))
    assert stored is not None
    assert stored.cancel_requested

    FlowManager(store).cancel(UUID(flow_id))
    refused = project.flow("cancel", flow_id)
    assert (refused.returncode, "it has ended" in refused.stderr) == (1, True)


def test_a_flow_whose_code_is_gone_is_cancelled_now(project: Project, store: SqlFlowStore) -> None:
    flow_id = project.done("start", "shop/hello").strip()
    assert project.done("cancel", "--now", flow_id) == f"{flow_id} cancelled\n"
    stored = store.get(UUID(flow_id))
    assert stored is not None
    assert stored.status is FlowStatus.CANCELLED


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


def test_pause_keeps_flows_and_unpause_or_resume_lets_them_go_on(project: Project, store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    one, other = a_flow(manager), a_flow(manager)
    manager.set_waiting(one, {"kind": "manual"})

    assert project.done("pause", str(one), str(other)) == f"{one} paused\n{other} paused\n"
    assert manager.get(one).paused_at is not None
    assert project.done("pause", str(one)) == f"{one} is paused already\n"
    assert f"{one}\torders/import\twaiting, paused" in project.done("list")

    assert project.done("resume", str(one)) == f"{one} unpaused; it still waits for somebody to resume it\n"
    assert (manager.get(one).paused_at, manager.get(one).status) == (None, FlowStatus.WAITING)
    assert project.done("unpause", str(other)) == f"{other} unpaused\n"
    assert project.done("unpause", str(other)) == f"{other} is not paused\n"
    assert project.done("resume", str(one)) == f"{one} resumed\n"
    assert manager.get(one).status is FlowStatus.RUNNING


def test_a_patch_for_a_paused_flow_is_not_lost_but_refused(project: Project, store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    flow_id = a_flow(manager)
    manager.set_waiting(flow_id, {"kind": "manual"})
    manager.pause(flow_id)

    refused = project.flow("resume", str(flow_id), "--patch", '{"checked": true}')

    assert (refused.returncode, "unpause it first" in refused.stderr) == (1, True)
    assert manager.get(flow_id).paused_at is not None


def test_of_many_flows_each_is_tried_and_what_failed_is_told(project: Project, store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    ended, running = a_flow(manager), a_flow(manager)
    manager.finish(ended)

    told = project.flow("cancel", str(ended), str(running), str(ended), "--yes")

    assert told.returncode == 1
    assert told.stdout == f"{running} cancel requested\n"
    assert told.stderr.count("Error: ") == 1
    assert "it has ended" in told.stderr


def test_cancel_by_options_takes_all_open_flows_that_fit(project: Project, store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    mine = [a_flow(manager, owner="bob") for _ in range(3)]
    foreign, ended = a_flow(manager), a_flow(manager, owner="bob")
    manager.set_waiting(mine[0], {"kind": "manual"})
    manager.request_cancel(mine[1])
    manager.finish(ended)

    told = project.done("cancel", "--owner", "bob", "--flow", "orders/import", "--yes")

    assert sorted(line.split()[0] for line in told.splitlines()) == sorted(map(str, (mine[0], mine[2])))
    assert not manager.get(foreign).cancel_requested
    assert project.flow("cancel", "--owner", "bob", "--yes").stderr == "no open flow fits\n"


def test_retry_and_fork_start_flows_that_go_on(served: Project) -> None:
    failed = served.flow("start", "shop/fail", "--wait", "30").stderr.split()[2]
    ended = served.done("start", "shop/double", "21", "--wait", "30").split()[0]

    old, _, _, new = served.done("retry", failed).split()
    assert old == failed
    assert f"forked from\t{failed}" in served.done("show", new).splitlines()

    old, _, _, forked = served.done("fork", ended, "--from-step", "twice", "--state", '{"why": "again"}').split()
    assert json.loads(served.done("show", forked, "--json", "--payloads"))["flow"]["state_json"] == {"why": "again"}

    refused = served.flow("fork", ended, "--from-step", "thrice")
    assert (refused.returncode, "twice" in refused.stderr) == (2, True)
    refused = served.flow("retry", ended)
    assert (refused.returncode, "neither failed nor was it cancelled" in refused.stderr) == (1, True)


def test_an_approval_is_granted_or_refused_and_one_of_another_name_is_said_to_be_kept(served: Project) -> None:
    granted, refused = (served.done("start", "shop/ask").strip() for _ in range(2))
    for flow_id in (granted, refused):
        until(partial(_tells, served, flow_id, "waits for\t"), "it asks", within_seconds=30)

    early = served.flow("approve", granted, "shipp", "--by", "Ada")
    assert early.stderr == ("the flow does not ask for 'shipp' yet: it is kept until it does; now it asks for 'ship'\n")
    told = served.flow("approve", granted, "ship", "--by", "Ada")
    assert (told.stdout, told.stderr) == (f"{granted} 'ship' granted\n", "")
    served.done("approve", refused, "ship", "--by", "Bob", "--refuse", "--comment", "too dear")

    for flow_id, result in (granted, "yes by Ada: "), (refused, "no by Bob: too dear"):
        until(partial(_tells, served, flow_id, "status\tfinished"), "it ends", within_seconds=30)
        assert f'result\t"{result}"' in served.done("show", flow_id, "--payloads").splitlines()
    over = served.flow("approve", granted, "ship", "--by", "Ada")
    assert (over.returncode, "it has ended" in over.stderr) == (1, True)


def _tells(project: Project, flow_id: str, text: str) -> bool:
    return text in project.done("show", flow_id)
