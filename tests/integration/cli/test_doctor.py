"""``flow doctor``."""

from __future__ import annotations

import json

from celery_flows import SqlFlowStore
from tests.support.commandline import Project
from tests.support.faults import closed_port


def test_doctor_says_that_all_is_well_and_exits_with_0(project: Project, store: SqlFlowStore) -> None:
    assert project.done("doctor") == "ready, 0 findings\n"
    said = json.loads(project.done("doctor", "--json"))
    assert (said["ready"], said["findings"]) == (True, [])


def test_doctor_says_what_is_wrong_and_exits_with_1(project: Project, store: SqlFlowStore) -> None:
    away = project.but(FLOW_STORE_URL=f"postgresql://me:hunter2@127.0.0.1:{closed_port()}/nowhere")

    told, as_json = away.flow("doctor"), away.flow("doctor", "--json")

    assert (told.returncode, as_json.returncode) == (1, 1)
    assert told.stdout.startswith("problem database: the database could not be reached")
    assert told.stdout.endswith("\nnot ready, 1 findings\n")
    said = json.loads(as_json.stdout)
    assert said["ready"] is False
    assert [sorted(finding) for finding in said["findings"]] == [["about", "cause", "kind", "problem", "remedy"]]
    assert "Traceback" not in told.stderr + as_json.stderr
    assert "hunter2" not in told.stdout + as_json.stdout


def test_doctor_without_a_database_to_look_at_says_what_to_set(project: Project) -> None:
    unset = project.but(FLOW_STORE_URL=None).flow("doctor")
    assert unset.returncode == 2
    assert "set FLOW_STORE_URL" in unset.stderr
    assert project.flow("doctor", "--timeout", "soon").returncode == 2
