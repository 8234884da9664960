"""``flow migrate``, ``sweep``, ``prune`` and ``verify``."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from celery_flows import FlowManager, FlowStatus, SqlFlowStore
from celery_flows.store import schema
from celery_flows.store.engines import make_engine
from celery_flows.store.tables import flows
from tests.integration.cli.shop import a_flow
from tests.support.commandline import Project
from tests.support.databases import Databases
from tests.support.warm import WarmCelery


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_two_migrations_at_once_both_succeed_and_a_third_changes_nothing(
    kind: str, warm: WarmCelery, databases: Databases, folder: Path, tmp_path: Path
) -> None:
    made = databases.sqlite(tmp_path / "new.db", empty=True) if kind == "sqlite" else databases.postgresql(empty=True)
    with made as url:
        project = Project(folder, {"FLOW_STORE_URL": url, "CELERY_BROKER_URL": "memory://"})
        with ThreadPoolExecutor(2) as pool:
            at_once = list(pool.map(lambda _: project.flow("migrate"), range(2)))

        for ended in [*at_once, replace(project, warm=warm).flow("migrate")]:
            assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"schema: {schema.head()}\n", "")
        engine = make_engine(url)
        assert schema.at(engine) == schema.head()
        engine.dispose()


def test_the_tables_are_taken_away_only_by_who_says_yes(project: Project, store: SqlFlowStore) -> None:
    a_flow(FlowManager(store))

    refused = project.flow("migrate", "--to", "base")
    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    assert len(store.list_by_status(FlowStatus.RUNNING)) == 1

    assert project.done("migrate", "--to", "base", "--yes") == "schema: no tables\n"
    assert not sa.inspect(store.engine).has_table("flows")


def test_prune_deletes_what_ended_before_the_days_that_are_kept(project: Project, store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    old, fresh, running = a_flow(manager), a_flow(manager), a_flow(manager)
    manager.finish(old)
    manager.finish(fresh)
    ended = datetime.now(UTC) - timedelta(days=31)
    with store.engine.begin() as connection:
        connection.execute(sa.update(flows).where(flows.c.id == old).values(finished_at=ended, updated_at=ended))

    assert project.done("prune", "--yes") == "1 flows pruned\n"
    assert (store.get(old), store.get(fresh) is None, store.get(running) is None) == (None, False, False)


def test_prune_archives_what_it_deletes_or_deletes_nothing(
    project: Project, store: SqlFlowStore, tmp_path: Path
) -> None:
    manager = FlowManager(store)
    flow_id = a_flow(manager)
    manager.finish(flow_id)
    prune = "prune", "--retain-days", "0", "--yes", "--archive"

    refused = project.flow(*prune, str(tmp_path / "missing" / "flows.jsonl"))
    assert (refused.returncode, refused.stdout, store.get(flow_id) is None) == (1, "", False)
    assert "the archive could not be written" in refused.stderr
    assert "Traceback" not in refused.stderr

    assert project.done(*prune, str(tmp_path / "flows.jsonl")) == "1 flows pruned\n"
    (line,) = (tmp_path / "flows.jsonl").read_text().splitlines()
    assert json.loads(line)["flow"]["id"] == str(flow_id)
    assert store.get(flow_id) is None


def test_verify_says_nothing_is_wrong_and_exits_with_0(project: Project, store: SqlFlowStore) -> None:
    flow_id = a_flow(FlowManager(store))
    project.done("start", "shop/hello")

    assert project.done("verify") == "2 flows, 0 findings\n"
    assert project.done("verify", str(flow_id)) == "1 flows, 0 findings\n"
    assert json.loads(project.done("verify", "--json")) == {"flows": 2, "findings": []}


def test_verify_names_what_is_wrong_and_exits_with_1(project: Project, store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    whole, forged = a_flow(manager), a_flow(manager)
    with store.engine.begin() as connection:
        connection.execute(sa.update(flows).where(flows.c.id == forged).values(goal="hunter2"))

    told, as_json = project.flow("verify"), project.flow("verify", "--json")

    assert (told.returncode, as_json.returncode) == (1, 1)
    assert told.stdout == f"{forged}: the row differs from its events: goal\n2 flows, 1 findings\n"
    finding = {"flow_id": str(forged), "kind": "flow", "about": "goal"}
    assert json.loads(as_json.stdout) == {"flows": 2, "findings": [finding]}
    assert "Traceback" not in told.stderr + as_json.stderr
    assert "hunter2" not in told.stdout + as_json.stdout
    assert project.flow("verify", str(whole)).returncode == 0


def test_verify_since_looks_only_at_what_has_changed_since_then(project: Project, store: SqlFlowStore) -> None:
    forged = a_flow(FlowManager(store))
    a_flow(FlowManager(store))
    with store.engine.begin() as connection:
        values = {"goal": "forged", "updated_at": datetime(2020, 1, 1, tzinfo=UTC)}
        connection.execute(sa.update(flows).where(flows.c.id == forged).values(values))

    assert project.done("verify", "--since", "2021-01-01") == "1 flows, 0 findings\n"
    assert project.flow("verify", "--since", "2019-12-31T23:59:59").returncode == 1
    assert project.flow("verify", "--since", "yesterday").returncode == 2
    assert project.flow("verify", "42").returncode == 2
