"""``flow tail``: events as they come."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from uuid import UUID

import pytest
import sqlalchemy as sa

from celery_flows import FlowManager, SqlFlowStore
from celery_flows.store.engines import make_engine
from celery_flows.worker.cli.tail import LATE_SECONDS, Cursor
from tests.integration.cli.shop import a_flow
from tests.support.bench import Bench
from tests.support.commandline import CELERY, Project
from tests.support.databases import Databases
from tests.support.warm import WarmCelery

TAIL = (*CELERY, "-A", "shop", "flow", "tail", "--every", "0.1")


def test_the_tail_of_a_flow_ends_with_it(project: Project, store: SqlFlowStore, tmp_path: Path) -> None:
    manager = FlowManager(store)
    flow_id, other = a_flow(manager), a_flow(manager)
    with project.started(*TAIL, str(flow_id), "--json", log=tmp_path / "tail") as tail:
        tail.wait_for('"started"')
        manager.update_state(flow_id, {"card": "hunter2"})
        manager.update_state(other, {})
        manager.set_waiting(flow_id, {"kind": "external_event", "topic": "paid", "correlation_id": "o1"})
        tail.wait_for('"waiting"')
        manager.fail(flow_id, "no more boxes")
        assert tail.ended() == 0

    *events, last = tail.output.splitlines()
    told = [json.loads(line) for line in events]
    assert [event["kind"] for event in told] == ["created", "started", "state_updated", "waiting", "failed"]
    assert {event["flow_id"] for event in told} == {str(flow_id)}
    assert told[3]["about"] == "event 'paid' for 'o1'"
    assert last == f"{flow_id} failed"
    assert "hunter2" not in tail.output


def test_the_tail_of_all_flows_ends_on_ctrl_c_without_a_word(
    project: Project, store: SqlFlowStore, tmp_path: Path
) -> None:
    manager = FlowManager(store)
    known = a_flow(manager)
    with project.started(*TAIL, "--events", "1", "--owner", "ada", log=tmp_path / "tail") as tail:
        tail.wait_for("\tstarted")
        new, foreign = a_flow(manager), a_flow(manager, owner="bob")
        tail.wait_for(f"{new}\torders/import\tstarted")
        manager.update_state(known, {})
        tail.wait_for("\tstate_updated")
        tail.send(signal.SIGINT)
        assert tail.ended() == 0

    rows = [line.split("\t")[1:] for line in tail.output.splitlines()]
    assert [row[:3] for row in rows] == [
        [str(known), "orders/import", "started"],
        [str(new), "orders/import", "created"],
        [str(new), "orders/import", "started"],
        [str(known), "orders/import", "state_updated"],
    ]
    assert str(foreign) not in tail.output


def test_the_tail_of_an_ended_flow_shows_its_last_events(project: Project, store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    flow_id = a_flow(manager)
    manager.finish(flow_id)

    ended = project.flow("tail", str(flow_id), "--events", "2")

    assert (ended.returncode, ended.stderr) == (0, f"{flow_id} finished\n")
    assert [line.split("\t")[1] for line in ended.stdout.splitlines()] == ["started", "finished"]
    assert project.flow("tail", str(flow_id), "--events", "0").stdout == ""


def test_a_tail_outlives_a_database_that_goes_away(
    databases: Databases, folder: Path, warm: WarmCelery, tmp_path: Path
) -> None:
    with databases.postgresql() as url:
        project = Project(folder, {"FLOW_STORE_URL": url, "CELERY_BROKER_URL": "memory://"}, warm)
        store = SqlFlowStore(make_engine(url))
        flow_id = a_flow(FlowManager(store))
        store.close()
        with project.started(*TAIL, str(flow_id), log=tmp_path / "tail") as tail:
            tail.wait_for("\tstarted")
            _let_in(url, False)
            tail.wait_for("looking again")
            _let_in(url, True)
            FlowManager(store).finish(flow_id)
            assert tail.ended() == 0
        store.close()

    kinds = [line.split("\t")[1] for line in tail.output.splitlines() if "\t" in line]
    assert kinds == ["created", "started", "finished"]
    assert tail.output.count("looking again") == 1


def _let_in(url: str, allowed: bool) -> None:
    """Has the server refuse connections to this database, and end those there are; or take them again."""
    at = sa.make_url(url)
    engine = sa.create_engine(at.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f'ALTER DATABASE "{at.database}" ALLOW_CONNECTIONS {allowed}'))
        end = sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name")
        connection.execute(end, {"name": at.database} if not allowed else {"name": ""})
    engine.dispose()


@pytest.fixture
def now() -> list[float]:
    return [100.0]


def test_an_event_that_commits_late_is_told_all_the_same(databases: Databases, now: list[float]) -> None:
    """Ids are given out when a statement runs and seen when its transaction commits: a cursor that only goes forward
    passes by what commits after a higher id."""
    with databases.postgresql() as url:
        store = SqlFlowStore(make_engine(url))
        bench = Bench(url)
        manager = FlowManager(store)
        flow_id, other = a_flow(manager), a_flow(manager)
        with store.engine.begin() as latest, store.engine.begin() as late:
            open_before = store.using(latest).append_event(flow_id, "noted", {})
            before = store.append_event(other, "noted", {})
            cursor = Cursor(bench.flows, None, 0, clock=lambda: now[0])
            early = store.using(late).append_event(flow_id, "noted", {})
            after = store.append_event(other, "noted", {})
            assert list(cursor.new()) == [[after.id]]
        assert open_before.id < before.id < early.id < after.id
        now[0] += LATE_SECONDS / 2

        assert list(cursor.new()) == [[open_before.id, early.id]]
        assert list(cursor.new()) == []
        bench.close()
        store.close()


def test_a_tail_forgets_what_it_has_seen(databases: Databases, now: list[float], tmp_path: Path) -> None:
    """Or else it would grow, and read more with each look."""
    with databases.sqlite(tmp_path / "flows.db") as url:
        bench = Bench(url)
        flow_id = a_flow(FlowManager(bench.store))
        cursor = Cursor(bench.flows, UUID(str(flow_id)), 10, clock=lambda: now[0])
        assert [len(ids) for ids in cursor.new()] == [2]
        for _ in range(30):
            now[0] += 1.0
            bench.store.append_event(flow_id, "noted", {})
            assert [len(ids) for ids in cursor.new()] == [1]

        assert cursor.remembered <= LATE_SECONDS + 1
        bench.close()
