"""``celery -A APP flow …``, as an operator types it: processes of their own, through Celery's own entry point."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import click
import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from celery_flows import FlowManager, FlowStatus, SqlFlowStore
from celery_flows.store import Flow, limits, schema
from celery_flows.store import operations as op
from celery_flows.store.changes import Drive
from celery_flows.store.engines import make_engine
from celery_flows.store.tables import flow_dispatch, flows
from celery_flows.worker.__main__ import main
from celery_flows.worker.cli import flow as flow_commands
from celery_flows.worker.embedded import Processes, start_broker
from tests.support.commandline import CELERY, Project
from tests.support.databases import Databases
from tests.support.faults import closed_port
from tests.support.warm import WarmCelery

SHOP = """
from celery import Celery
from celery_flows import Flows, Run

app = Celery("shop")
flows = Flows(app)


@flows.flow("shop/hello")
def hello(run: Run) -> str:
    return "hello"


@flows.flow("shop/double")
def double(run: Run, number: int) -> int:
    return run.step(twice, number)


def twice(number: int) -> int:
    return 2 * number


@flows.flow("shop/fail")
def fail(run: Run) -> None:
    raise RuntimeError("no more boxes")


@flows.flow("shop/wait")
def wait(run: Run, order: str) -> str:
    return run.wait_for("approval", order)["by"]
"""
# An app whose Flows is made in a module that only a worker would import.
LATE = 'from celery import Celery\n\napp = Celery("late", include=["late_flows"])\n'
LATE_FLOWS = """
from celery_flows import Flows, Run
from late import app

flows = Flows(app)


@flows.flow("late/hello")
def hello(run: Run) -> str:
    return "hello"
"""
PLAIN = 'from celery import Celery\n\napp = Celery("plain")\n'
MISSET = 'from celery import Celery\n\napp = Celery("misset")\napp.conf.flow_sweep_secs = 3\n'
MODULES = {"shop": SHOP, "late": LATE, "late_flows": LATE_FLOWS, "plain": PLAIN, "misset": MISSET}


def write_modules(folder: Path) -> Path:
    """A folder with the apps above."""
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder."""
    return write_modules(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmCelery]:
    """Runs commands without importing everything each time."""
    with WarmCelery() as running:
        yield running


@pytest.fixture
def project(warm: WarmCelery, folder: Path, sqlite_url: str) -> Project:
    """A user's shell in it, with a fresh database and a broker that nobody listens to."""
    return Project(folder, {"FLOW_STORE_URL": sqlite_url, "CELERY_BROKER_URL": "memory://"}, warm)


@pytest.fixture
def store(sqlite_url: str) -> Iterator[SqlFlowStore]:
    """The same database, from here."""
    opened = SqlFlowStore(make_engine(sqlite_url))
    try:
        yield opened
    finally:
        opened.close()


def a_flow(manager: FlowManager, controller_id: str = "orders/import", owner: str = "ada", **more: Any) -> UUID:
    """A flow that no definition drives, running."""
    made = manager.create_managed(controller_id=controller_id, goal="", owner_session_key=owner, **more)
    return manager.start_running(made.id).id


# migrate


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


# start


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


@pytest.fixture(scope="module")
def served(
    warm: WarmCelery, folder: Path, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Project]:
    """A shell with a database, a broker and a worker."""
    place = tmp_path_factory.mktemp("served")
    with databases.sqlite(place / "flows.db") as url, Processes(place) as processes:
        project = Project(folder, {"FLOW_STORE_URL": url, "CELERY_BROKER_URL": start_broker(processes)}, warm)
        worker = (*CELERY, "-A", "shop", "worker", "-c", "1", "-l", "info")
        with project.started(*worker, log=place / "worker.log") as running:
            running.wait_for(" ready.")
            yield project


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


# list and show


def test_list_filters_and_turns_pages(project: Project, store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    made = [a_flow(manager, owner="ada" if number % 2 else "bob") for number in range(5)]
    other = a_flow(manager, "orders/export")
    manager.finish(made[0])

    def listed(*options: str) -> list[UUID]:
        return [UUID(row["id"]) for row in json.loads(project.done("list", "--json", *options))]

    assert listed() == [other, *made[::-1]]
    assert listed("--status", "finished") == [made[0]]
    assert listed("--owner", "bob", "--flow", "orders/import") == made[4::-2]
    assert listed("--limit", "4") == [other, *made[:1:-1]]
    assert listed("--limit", "4", "--after", str(made[2])) == made[1::-1]
    assert listed("--owner", "nobody") == []
    kept = manager.create_managed(controller_id="orders/keyed", owner_session_key="ada", idempotency_key="k")
    assert listed("--key", "k") == [kept.id]
    later = (kept.created_at + timedelta(seconds=1)).strftime("%Y-%m-%dT%H:%M:%S")
    assert listed("--since", later) == []
    assert listed("--until", later, "--limit", "2") == [kept.id, other]


def test_list_in_a_pipe_is_a_line_a_flow_with_its_cells_parted_by_tabs(project: Project, store: SqlFlowStore) -> None:
    hostile = a_flow(FlowManager(store), owner="tab\tnewline\nescape\x1b[31m [/red]")

    head, row = project.done("list").splitlines()

    assert head.split("\t") == ["id", "flow", "status", "step", "owner", "updated"]
    cells = row.split("\t")
    assert cells[:3] == [str(hostile), "orders/import", "running"]
    assert cells[4] == r"tab\tnewline\nescape\x1b[31m [/red]"


def test_list_on_a_narrow_terminal_cuts_nothing(project: Project, store: SqlFlowStore) -> None:
    hostile = a_flow(FlowManager(store), "orders/" + "long" * 20, owner="escape\x1b[31m [/red]")

    code, shown = project.on_terminal(*CELERY, "-A", "shop", "flow", "list", columns=40)

    assert code == 0
    (row,) = (line for line in shown.splitlines() if str(hostile) in line)
    assert "orders/" + "long" * 20 in row
    assert r"escape\x1b[31m [/red]" in row


def test_show_tells_the_whole_story(served: Project) -> None:
    flow_id = served.done("start", "shop/double", "21", "--key", "shown", "--wait", "30").split()[0]

    told = served.done("show", flow_id)
    as_json = json.loads(served.done("show", flow_id, "--json", "--events", "2"))
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


# steer


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


def test_prune_deletes_what_ended_before_the_days_that_are_kept(project: Project, store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    old, fresh, running = a_flow(manager), a_flow(manager), a_flow(manager)
    manager.finish(old)
    manager.finish(fresh)
    ended = datetime.now(UTC) - timedelta(days=31)
    with store.engine.begin() as connection:
        connection.execute(sa.update(flows).where(flows.c.id == old).values(finished_at=ended, updated_at=ended))

    assert project.done("prune") == "1 flows pruned\n"
    assert (store.get(old), store.get(fresh) is None, store.get(running) is None) == (None, False, False)


def test_an_app_without_flows_of_its_own_can_be_looked_at(project: Project, store: SqlFlowStore) -> None:
    flow_id = a_flow(FlowManager(store))

    assert str(flow_id) in project.done("list", app="plain")


# what is refused


class Refusal(NamedTuple):
    """A command that cannot be done, and what its one sentence must say."""

    arguments: tuple[str, ...]
    code: int
    says: tuple[str, ...]
    settings: dict[str, str] = {}
    app: str | None = "shop"


NOBODY = str(uuid4())
SECRET = "s3cret"
GONE = f"postgresql://ada:{SECRET}@127.0.0.1:{closed_port()}/shop"
UNREACHABLE = ("could not be reached", "flow_store_url", "FLOW_STORE_URL", "ada:***@127.0.0.1")

REFUSALS = {
    "an unknown command": Refusal(("shpw",), 2, ("No such command 'shpw'",)),
    "an unknown option": Refusal(("list", "--colour"), 2, ("No such option",)),
    "an unknown flow name": Refusal(("start", "shop/helo"), 2, ("'shop/helo'", "registered are:", "shop/hello")),
    "an app with no flows": Refusal(("start", "shop/hello"), 2, ("registered are: none",), app="plain"),
    "no app at all": Refusal(("start", "shop/hello"), 2, ("celery -A APP flow",), app=None),
    "an input of the wrong type": Refusal(("start", "shop/double", '"two"'), 2, ("input", "integer")),
    "an input that is missing": Refusal(("start", "shop/double"), 2, ("input",)),
    "an input that is not wanted": Refusal(("start", "shop/hello", "1"), 2, ("input", "takes none")),
    "an input that is no JSON": Refusal(("start", "shop/double", "{"), 2, ("is no JSON", "quotes")),
    "an input that no database takes": Refusal(("start", "shop/wait", r'"\u0000"'), 2, ("input",)),
    "an input that JSON lacks": Refusal(("start", "shop/double", "NaN"), 2, ("input",)),
    "a key used with other input": Refusal(("start", "shop/double", "2", "--key", "taken"), 2, ("'taken'", "other")),
    "an empty key": Refusal(("start", "shop/hello", "--key", ""), 2, ("key",)),
    "a flow id that is none": Refusal(("show", "42"), 2, ("'42' is no flow id", "flow list")),
    "an unknown flow to show": Refusal(("show", NOBODY), 1, (f"no flow {NOBODY}",)),
    "an unknown flow to cancel": Refusal(("cancel", NOBODY), 1, (f"no flow {NOBODY}",)),
    "an unknown flow to resume": Refusal(("resume", NOBODY), 1, (f"no flow {NOBODY}",)),
    "an unknown page": Refusal(("list", "--after", NOBODY), 1, (f"no flow {NOBODY}",)),
    "a status that is none": Refusal(("list", "--status", "done"), 2, ("'done'", "finished")),
    "a patch that is no object": Refusal(("resume", NOBODY, "--patch", "3"), 2, ("--patch", "object")),
    "an empty topic": Refusal(("emit", "", "o1"), 2, ("topic",)),
    "a retention below nothing": Refusal(("prune", "--retain-days", "-1"), 2, ("--retain-days",)),
    "a schema version that is none": Refusal(("migrate", "--to", "tomorrow"), 2, ("'tomorrow'",)),
    "an unreachable database to list": Refusal(("list",), 1, UNREACHABLE, {"FLOW_STORE_URL": GONE}),
    "an unreachable database to start in": Refusal(("start", "shop/hello"), 1, UNREACHABLE, {"FLOW_STORE_URL": GONE}),
    "an unreachable database to migrate": Refusal(("migrate",), 1, UNREACHABLE, {"FLOW_STORE_URL": GONE}),
    "another kind of database": Refusal(
        ("list",), 2, ("mysql", "postgresql://"), {"FLOW_STORE_URL": f"mysql://ada:{SECRET}@127.0.0.1/shop"}
    ),
    "a database URL that is none": Refusal(
        ("list",), 2, ("flow_store_url", "postgresql://"), {"FLOW_STORE_URL": f"//{SECRET}"}
    ),
    "a database in a folder that is not there": Refusal(
        ("migrate",), 1, ("flow_store_url", "nowhere"), {"FLOW_STORE_URL": "sqlite:////nowhere/flows.db"}
    ),
    "no database at all": Refusal(
        ("list",), 2, ("flow_store_url: is not set", "FLOW_STORE_URL", "postgresql://"), {"FLOW_STORE_URL": "UNSET"}
    ),
    "an empty database URL": Refusal(("list",), 2, ("flow_store_url", "postgresql://"), {"FLOW_STORE_URL": ""}),
    "a bad setting": Refusal(("list",), 2, ("FLOW_SWEEP_LIMIT", "integer"), {"FLOW_SWEEP_LIMIT": "many"}),
    "a misspelt setting": Refusal(("list",), 2, ("did you mean FLOW_SWEEP_LIMIT",), {"FLOW_SWEP_LIMIT": "3"}),
    "a misspelt setting on the app": Refusal(("list",), 2, ("did you mean flow_sweep_seconds",), app="misset"),
    "a module that is not there": Refusal(
        ("start", "shop/hello"), 2, ("flow_imports", "'nowhere'"), {"FLOW_IMPORTS": "nowhere"}
    ),
    "tables that are not there": Refusal(
        ("list",), 1, ("no celery-flows tables", "flow migrate"), {"FLOW_STORE_URL": "EMPTY"}
    ),
    "tables of another version": Refusal(("list",), 1, ("at schema 0000", "flow migrate"), {"FLOW_STORE_URL": "OLD"}),
}  # fmt: skip


class Refused(NamedTuple):
    """What came of them all."""

    results: dict[str, CompletedProcess[str]]
    url: str
    empty_url: str
    kept: UUID


@pytest.fixture(scope="module")
def refused(
    warm: WarmCelery, folder: Path, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Refused]:
    """All refusals, one after the other; over three databases: with a flow, without tables, of another version."""
    place = tmp_path_factory.mktemp("refused")
    with (
        databases.sqlite(place / "flows.db") as url,
        databases.sqlite(place / "empty.db", empty=True) as empty,
        databases.sqlite(place / "old.db") as old,
    ):
        _make_older(old)
        urls = {"EMPTY": empty, "OLD": old, "URL": url, "UNSET": None}
        project = Project(folder, {"FLOW_STORE_URL": url, "CELERY_BROKER_URL": "memory://"}, warm)
        kept = UUID(project.done("start", "shop/double", "1", "--key", "taken").strip())

        def run(refusal: Refusal) -> CompletedProcess[str]:
            settings = {key: urls.get(value, value) for key, value in refusal.settings.items()}
            return project.but(**settings).flow(*refusal.arguments, app=refusal.app)

        yield Refused({name: run(refusal) for name, refusal in REFUSALS.items()}, url, empty, kept)


def _make_older(url: str) -> None:
    engine = make_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '0000'"))
    engine.dispose()


@pytest.mark.parametrize("what", REFUSALS)
def test_is_refused_in_one_sentence(what: str, refused: Refused) -> None:
    wanted, ended = REFUSALS[what], refused.results[what]

    assert ended.returncode == wanted.code, ended.stderr
    assert ended.stdout == ""
    lines = [line for line in ended.stderr.splitlines() if line and not line.startswith(("Usage: ", "Try "))]
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("Error: ")
    assert [part for part in wanted.says if part not in lines[0]] == [], lines[0]
    assert SECRET not in ended.stderr


def test_nothing_that_was_refused_left_anything_behind(refused: Refused) -> None:
    store = SqlFlowStore(make_engine(refused.url))
    with store.engine.connect() as connection:
        left = {table: connection.scalar(sa.text(f"SELECT count(*) FROM {table}")) for table in ("flows", "flow_inbox")}
        keys = connection.scalars(sa.select(flows.c.id)).all()
    store.close()
    engine = make_engine(refused.empty_url)
    tables = sa.inspect(engine).get_table_names()
    engine.dispose()

    assert left == {"flows": 1, "flow_inbox": 0}
    assert keys == [refused.kept]
    assert tables == []


# verify


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


# doctor


def test_doctor_says_that_all_is_well_and_exits_with_0(project: Project, store: SqlFlowStore) -> None:
    assert project.done("doctor") == "ready, 0 findings\n"
    assert json.loads(project.done("doctor", "--json")) == {"ready": True, "findings": []}


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


# help


def commands() -> dict[str, click.Command]:
    """Every command of ours, by how it is called."""
    ours = {f"flow {name}": command for name, command in flow_commands.commands.items()}
    return {"flow": flow_commands, **ours, "celery-flows": main, "celery-flows dev": main.commands["dev"]}


@pytest.mark.parametrize("name", commands())
def test_help_explains_the_command_and_each_of_its_options(name: str) -> None:
    command = commands()[name]
    shown = CliRunner().invoke(command, ["--help"], prog_name=name)

    assert shown.exit_code == 0, shown.output
    assert command.help
    assert command.get_short_help_str(200).endswith("."), "the first sentence stands alone in the list of commands"
    assert [option.name for option in command.params if isinstance(option, click.Option) and not option.help] == []
    assert max(map(len, shown.output.splitlines())) <= 80


def test_celery_itself_shows_the_commands(project: Project) -> None:
    shown = project.done("--help")

    assert [name for name in flow_commands.commands if f"\n  {name} " not in shown] == []
    assert "\n  celery -A APP flow COMMAND" in shown
