"""Whatever is wrong is answered by one sentence and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import NamedTuple
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa

from celery_flows import SqlFlowStore
from celery_flows.store import schema
from celery_flows.store.engines import make_engine
from celery_flows.store.tables import flows
from tests.support.commandline import Project
from tests.support.databases import Databases
from tests.support.faults import closed_port
from tests.support.warm import WarmCelery


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
    "an unknown flow name": Refusal(
        ("start", "shop/helo"), 2, ("'shop/helo'", "registered are:", "did you mean 'shop/hello'?")
    ),
    "a priority that is none": Refusal(("start", "shop/hello", "--priority", "256"), 2, ("--priority", "255")),
    "a time that is none": Refusal(("start", "shop/hello", "--eta", "soon"), 2, ("--eta", "'soon' is no time", "UTC")),
    "both countdown and eta": Refusal(
        ("start", "shop/hello", "--countdown", "3", "--eta", "2030-01-01"), 2, ("eta", "countdown")
    ),
    "a countdown that is none": Refusal(("start", "shop/hello", "--countdown", "nan"), 2, ("countdown",)),
    "a countdown past all": Refusal(("start", "shop/hello", "--countdown", "1e300"), 2, ("countdown", "days")),
    "a since that is none": Refusal(("list", "--since", "2 hours"), 2, ("--since", "how long ago: 90s, 15m, 2h, 3d")),
    "nothing to cancel": Refusal(("cancel",), 2, ("--status, --owner and --flow",)),
    "flows to cancel, and which": Refusal(("cancel", NOBODY, "--owner", "ada"), 2, ("one of the two",)),
    "many to cancel, and nobody there": Refusal(("cancel", NOBODY, str(uuid4())), 2, ("2 flows", "--yes")),
    "a prune, and nobody there": Refusal(("prune",), 2, ("deletes 0 flows", "--yes")),
    "an unknown flow to pause": Refusal(("pause", NOBODY), 1, (f"no flow {NOBODY}",)),
    "an unknown flow to unpause": Refusal(("unpause", NOBODY), 1, (f"no flow {NOBODY}",)),
    "an unknown flow to retry": Refusal(("retry", NOBODY), 1, (f"no flow {NOBODY}",)),
    "an unknown flow to fork": Refusal(("fork", NOBODY, "--from-step", "pack"), 1, (f"no flow {NOBODY}",)),
    "a fork from nowhere": Refusal(("fork", NOBODY), 2, ("--from-step",)),
    "an unknown flow to approve": Refusal(("approve", NOBODY, "ship", "--by", "Ada"), 1, (f"no flow {NOBODY}",)),
    "an approval by nobody": Refusal(("approve", NOBODY, "ship"), 2, ("--by",)),
    "an unknown flow to tail": Refusal(("tail", NOBODY), 1, (f"no flow {NOBODY}",)),
    "a tail of one flow of an owner": Refusal(("tail", NOBODY, "--owner", "ada"), 2, ("--owner", "all flows")),
    "a payload that is no JSON": Refusal(("emit", "paid", "o1", "{'a': 1}"), 2, ("is no JSON",)),
    "an argument too many": Refusal(("show", NOBODY, "more"), 2, ("unexpected extra argument",)),
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
    "a schema version that is past": Refusal(("migrate", "--to", "0001"), 2, ("0001", "only base goes back")),
    "an unreachable database to list": Refusal(("list",), 1, UNREACHABLE, {"FLOW_STORE_URL": GONE}),
    "an unreachable database to start in": Refusal(("start", "shop/hello"), 1, UNREACHABLE, {"FLOW_STORE_URL": GONE}),
    "an unreachable database to count in": Refusal(("stats",), 1, UNREACHABLE, {"FLOW_STORE_URL": GONE}),
    "an unreachable database to tail": Refusal(("tail",), 1, UNREACHABLE, {"FLOW_STORE_URL": GONE}),
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
