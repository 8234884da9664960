"""``--json``: every command prints what docs/reference/cli.md says."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from celery_flows import FlowManager, SqlFlowStore
from celery_flows.store import FlowStepStatus
from celery_flows.store.engines import make_engine
from celery_flows.worker.cli import flow, shapes
from celery_flows.worker.cli.command import FlowCommand
from tests.integration.cli.shapes import misfits
from tests.integration.cli.shop import a_flow
from tests.support.commandline import Project
from tests.support.waiting import until


def told(project: Project, *arguments: str, codes: tuple[int, ...] = (0,)) -> Any:
    """What a command prints with ``--json``, which must have its shape."""
    command = flow.commands[arguments[0]]
    assert isinstance(command, FlowCommand)
    ended = project.flow(*arguments, "--json")
    assert ended.returncode in codes, ended.stderr
    lines = ended.stdout.splitlines()
    printed = [json.loads(line) for line in lines] if arguments[0] == "tail" else [json.loads(ended.stdout)]
    assert [misfit for each in printed for misfit in misfits(each, command.prints)] == []
    return printed if arguments[0] == "tail" else printed[0]


def test_every_command_prints_its_shape(served: Project) -> None:
    with closing(SqlFlowStore(make_engine(served.settings["FLOW_STORE_URL"]))) as store:
        manager = FlowManager(store)
        waiting, failed, parent = a_flow(manager), a_flow(manager), a_flow(manager)
        manager.set_waiting(waiting, {"kind": "external_event", "topic": "paid", "correlation_id": "o1"})
        manager.record_step_observation(flow_id=failed, run_id="r1", task="pack", status=FlowStepStatus.FAILED)
        manager.fail(failed, "no more boxes")
        a_flow(manager, parent_flow_id=parent)
        ended = told(served, "start", "shop/double", "21", "--wait", "30")["id"]
        broken = told(served, "start", "shop/fail")["id"]
        one, other = told(served, "start", "shop/wait", '"o2"')["id"], told(served, "start", "shop/wait", '"o3"')["id"]
        until(lambda: manager.get(UUID(broken)).status.is_terminal, "it has failed", within_seconds=30)
        until(lambda: manager.get(UUID(one)).wait_json is not None, "it waits", within_seconds=30)

        seen = {
            "start": one,
            "list": told(served, "list", "--limit", "2"),
            "show": [told(served, "show", str(each)) for each in (waiting, failed, parent, one, broken)],
            "show --payloads": told(served, "show", ended, "--payloads"),
            "tail": told(served, "tail", ended, "--payloads"),
            "pause": told(served, "pause", one),
            "unpause": told(served, "unpause", one),
            "resume": told(served, "resume", str(failed), str(waiting), codes=(1,)),
            "retry": told(served, "retry", broken, ended, codes=(1,)),
            "fork": told(served, "fork", ended, "--from-step", "twice"),
            "emit": told(served, "emit", "paid", "o4", '{"cents": 5}'),
            "approve": told(served, "approve", one, "ship", "--by", "Ada"),
            "cancel": told(served, "cancel", one, other, "--yes"),
            "sweep": told(served, "sweep"),
            "prune": told(served, "prune", "--yes"),
            "prune --dry-run": told(served, "prune", "--dry-run"),
            "verify": told(served, "verify", codes=(0, 1)),
            "doctor": told(served, "doctor", codes=(0, 1)),
            "migrate": told(served, "migrate"),
            "stats": told(served, "stats"),
        }

    assert {name.partition(" ")[0] for name in seen} == set(flow.commands)
    assert [outcome["error"] is None for outcome in seen["resume"]["flows"]] == [False, True]
    assert [outcome["started"] is None for outcome in seen["retry"]["flows"]] == [False, True]
    assert (seen["emit"]["kept"], seen["approve"]["kept"]) == (True, True)


def test_a_shape_that_does_not_fit_is_noticed() -> None:
    """Or else the tests above prove nothing."""
    assert misfits({"id": "1", "kept": True}, shapes.Emitted) == []
    assert misfits({"id": "1"}, shapes.Emitted) == [".kept is missing"]
    assert misfits({"id": 1, "kept": 0, "more": 1}, shapes.Emitted) != []
    assert misfits({"flows": [{"id": "1"}]}, shapes.Steered) == [
        ".flows[0].done is missing", ".flows[0].error is missing"
    ]  # fmt: skip


def test_times_are_iso_8601_and_end_in_z(project: Project, store: SqlFlowStore) -> None:
    a_flow(FlowManager(store))

    times = [told(project, "stats")["at"], told(project, "list")["flows"][0]["created_at"]]

    assert [each[-1] for each in times] == ["Z", "Z"]
    assert all(datetime.fromisoformat(each).tzinfo == UTC for each in times)
