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


def test_doctor_shows_the_settings_in_force_without_a_password(project: Project) -> None:
    secret = {"FLOW_STORE_URL": "postgresql://me:hunter2@127.0.0.1:1/x?password=hunter2", "FLOW_RETAIN_DAYS": "7"}
    away = project.but(**secret, CELERY_BROKER_URL="redis://:hunter2@127.0.0.1:1/0")

    told, as_json = away.flow("doctor", "--settings"), away.flow("doctor", "--json")

    rows = [line.split("\t") for line in told.stdout.partition("\n\n")[0].splitlines()[2:]]
    assert ["flow_retain_days", "7", "environment"] in rows
    assert ["flow_sweep_limit", "500", "default"] in rows
    said = json.loads(as_json.stdout)["settings"]
    assert said["flow_store_url"] == {"value": "postgresql+psycopg://me:***@127.0.0.1:1/x", "source": "environment"}
    assert "127.0.0.1:1/0" in said["broker_url"]["value"]
    assert "hunter2" not in told.stdout + told.stderr + as_json.stdout + as_json.stderr


def test_doctor_without_a_database_to_look_at_says_what_to_set(project: Project) -> None:
    unset = project.but(FLOW_STORE_URL=None).flow("doctor")
    assert unset.returncode == 2
    assert "set FLOW_STORE_URL" in unset.stderr
    assert project.flow("doctor", "--timeout", "soon").returncode == 2
