"""``flow start`` and ``emit``."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from uuid import UUID

import sqlalchemy as sa

from celery_flows import FlowManager, FlowStatus, SqlFlowStore
from celery_flows.store import operations as op
from celery_flows.store import views
from celery_flows.store.tables import flow_dispatch
from tests.integration.cli.shop import a_flow
from tests.support.commandline import CELERY, Project
from tests.support.faults import closed_port


def test_start_prints_the_id_of_a_flow_that_is_stored_with_its_order_to_run(
    project: Project, store: SqlFlowStore
) -> None:
    printed = project.done("start", "shop/hello")
    as_json = json.loads(project.done("start", "shop/double", "21", "--owner", "ada", "--goal", "a test", "--json"))

    for flow_id in (UUID(printed.strip()), UUID(as_json["id"])):
        stored = store.get(flow_id)
        assert stored is not None
        assert stored.status is FlowStatus.CREATED
        with store.engine.connect() as connection:
            assert (
                connection.scalar(sa.select(flow_dispatch.c.kind).where(flow_dispatch.c.flow_id == flow_id)) == "drive"
            )
    told = store.get(UUID(as_json["id"]))
    assert told is not None
    assert (told.input_json, told.owner_session_key, told.goal) == (21, "ada", "a test")


def test_the_same_key_gives_the_same_flow(project: Project) -> None:
    first = project.done("start", "shop/double", "21", "--key", "k1")
    again = project.done("start", "shop/double", "21", "--key", "k1")

    assert again == first


def test_an_app_whose_flows_are_made_in_an_included_module_is_found_whole(project: Project) -> None:
    assert UUID(project.done("start", "late/hello", app="late").strip())


def test_with_no_broker_at_all_start_succeeds_and_says_what_follows(project: Project, store: SqlFlowStore) -> None:
    started = project.but(CELERY_BROKER_URL=f"redis://127.0.0.1:{closed_port()}/0").flow("start", "shop/hello")

    assert started.returncode == 0
    assert store.get(UUID(started.stdout.strip())) is not None
    assert "the sweep" in started.stderr
    assert "Traceback" not in started.stderr


def test_wait_prints_the_result(served: Project) -> None:
    flow_id, status, result = re.split(r"\s+", served.done("start", "shop/double", "21", "--wait", "30").strip())
    as_json = json.loads(served.done("start", "shop/hello", "--wait", "30", "--json"))

    assert (UUID(flow_id).version, status, result) == (7, "finished", "42")
    assert as_json == {"id": as_json["id"], "status": "finished", "result": "hello"}


def test_waiting_for_a_flow_that_fails_says_why(served: Project) -> None:
    failed = served.flow("start", "shop/fail", "--wait", "30")

    assert failed.returncode == 1
    assert re.fullmatch(r"Error: flow [\w-]+ failed \(.+\): RuntimeError: no more boxes\n", failed.stderr)


def test_waiting_in_vain_says_that_the_flow_goes_on_and_an_emitted_event_lets_it(served: Project) -> None:
    waited = served.flow("start", "shop/wait", '"o1"', "--key", "o1", "--wait", "0.2")
    assert waited.returncode == 1
    assert "it goes on" in waited.stderr

    assert served.done("emit", "approval", "o1", '{"by": "Ada"}').endswith(" emitted\n")
    again = served.done("start", "shop/wait", '"o1"', "--key", "o1", "--wait", "30")
    assert again.splitlines()[-1] == '"Ada"'


def test_start_later_and_with_a_priority(project: Project, store: SqlFlowStore) -> None:
    later = UUID(project.done("start", "shop/hello", "--countdown", "3600", "--priority", "7").strip())
    at = UUID(project.done("start", "shop/hello", "--eta", "2100-01-01T00:00:00+02:00").strip())

    rows = {
        row.run_id: row for row in store.run(views.list_dispatched, later, 9) + store.run(views.list_dispatched, at, 9)
    }
    now = store.run(op.now)
    due = rows[str(later)].due_at
    assert due is not None
    assert timedelta(minutes=59) < due - now <= timedelta(hours=1)
    assert rows[str(at)].due_at == datetime(2099, 12, 31, 22, tzinfo=UTC)
    with store.engine.connect() as connection:
        mine = sa.select(flow_dispatch.c.priority).where(flow_dispatch.c.run_id == str(later))
        assert connection.scalar(mine) == 7


def test_input_can_come_from_standard_input(project: Project, store: SqlFlowStore) -> None:
    started = project.run(*CELERY, "-A", "shop", "flow", "start", "shop/double", "-", input="21\n")

    assert started.returncode == 0, started.stderr
    stored = store.get(UUID(started.stdout.strip()))
    assert stored is not None
    assert stored.input_json == 21


def test_an_event_that_nobody_waits_for_is_said_to_be_kept(project: Project, store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    waiting = a_flow(manager)
    manager.set_waiting(waiting, {"kind": "external_event", "topic": "paid", "correlation_id": "o1"})

    assert project.flow("emit", "paid", "o1").stderr == ""
    assert project.flow("emit", "paid", "o2").stderr == "no flow waits for it yet: it is kept until one does\n"
