"""README.md does what it says: every block in it is run, as it stands there. The guide has a test of its own.

A command or a block that no test here knows fails, so whoever adds one also says how it is tried.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, TypeVar

from celery_flows import FlowStatus, SqlFlowStore
from examples.verify_packages import audit
from tests.support.brokers import Broker
from tests.support.commandline import ROOT, Background, Project
from tests.support.databases import Databases
from tests.support.faults import closed_port
from tests.support.waiting import until

Test = TypeVar("Test", bound=Callable[..., Any])

HERE = Path(sys.executable).parent  # where celery and celery-flows are installed, as in an activated environment
BUILT_FROM = (
    "pyproject.toml", "README.md", "LICENSE", "_celery_flows_pytest.py", "celery_flows", "store", "tasks", "worker",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A block of code on a page."""

    page: str
    language: str
    text: str


def blocks() -> list[Block]:
    """All of them, in the order of the pages."""
    found = []
    for page in ("README.md",):
        fences = re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
        found += [Block(page, fence[2], textwrap.dedent(fence[3])) for fence in fences]
    return found


def block_with(text: str) -> str:
    """The one block that holds this."""
    (found,) = (block.text for block in blocks() if text in block.text)
    return found


_tried: dict[str, str] = {}  # what is tried, and by which test


def tries(*what: str) -> Callable[[Test], Test]:
    """Marks a test that runs these commands, or the Python blocks in which these words stand."""

    def mark(test: Test) -> Test:
        _tried.update(dict.fromkeys(what, test.__name__))
        return test

    return mark


def shell(folder: Path, **settings: str) -> Project:
    """A user's shell there, with our commands on its path."""
    return Project(folder, {"PATH": f"{HERE}{os.pathsep}{os.environ['PATH']}", **settings})


@contextmanager
def in_background(project: Project, command: str, *options: str) -> Iterator[Background]:
    """A command of the page that runs until it is stopped."""
    log = project.folder / f"{re.sub(r'[^a-z]+', '-', command)}.log"
    with project.started(*command.split(), *options, log=log) as running:
        yield running


def write_shop(folder: Path) -> None:
    """The page's application, in the file that its first line names."""
    shop = block_with('@flows.flow("shop/fulfil")')
    assert shop.startswith("# shop.py\n")
    (folder / "shop.py").write_text(shop)


def test_every_block_is_in_a_language_that_is_tried() -> None:
    plain = [block for block in blocks() if block.language not in ("sh", "python")]

    assert [block.text for block in plain if block.language or "───" not in block.text] == []


def test_every_command_is_run_by_a_test() -> None:
    commands = {line for block in blocks() if block.language == "sh" for line in block.text.splitlines() if line}

    assert commands == {what for what in _tried if "\n" not in what and what in commands}, "a command that nobody tries"
    stale = [what for what in _tried if not any(what in block.text for block in blocks())]
    assert stale == []


def test_every_python_block_is_run_by_a_test() -> None:
    unknown = [
        block for block in blocks() if block.language == "python" and not any(what in block.text for what in _tried)
    ]

    assert [block.text for block in unknown] == []


@tries("make demo")
def test_make_demo() -> None:
    report = ROOT / "verify-packages.json"
    before = report.read_text() if report.exists() else None
    report.unlink(missing_ok=True)
    try:
        # What it runs on is there already, or this test would not run: it need not be installed once more.
        ended = shell(ROOT).run("make", "-o", ".venv/.installed", f"python={sys.executable}", "demo")
        told = json.loads(report.read_text())
    finally:
        report.unlink(missing_ok=True) if before is None else report.write_text(before)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"^killed worker-\d with SIGKILL at .*: exit code -9$", ended.stdout, re.MULTILINE)
    assert ended.stdout.splitlines()[-1] == "finished"
    assert told["distributions"] == len(audit.find_distributions(Path(told["folder"])))
    assert told["files"] > told["distributions"]


@tries("make test")
def test_make_test_would_run_all_tests() -> None:
    ended = shell(ROOT).run("make", "-n", "-o", ".venv/.installed", "test")

    assert (ended.returncode, ended.stdout) == (0, ".venv/bin/python -m pytest -n 3 --dist loadfile\n")


INSTALL_ALL = "pip install '.[embedded,flower]'"
DEV = "celery-flows dev -A shop"
SOURCE = ". .celery-flows/env"
START = """celery -A shop flow start shop/fulfil '"order-1"' --key order-1"""
EMIT = """celery -A shop flow emit approval order-1 '{"by": "Ada"}'"""
LIST = "celery -A shop flow list"
SHOW = "celery -A shop flow show FLOW_ID --payloads"


@tries("# shop.py", DEV, SOURCE, START, EMIT, LIST, SHOW)
def test_the_flow_of_the_first_page_with_everything_in_one_command(tmp_path: Path) -> None:
    write_shop(tmp_path)
    project = shell(tmp_path)
    other_terminal = block_with(START).splitlines()
    assert other_terminal == [SOURCE, START, EMIT, LIST, SHOW]

    with in_background(project, DEV, "--flower-port", str(closed_port())) as dev:
        dev.wait_for("ready; Ctrl-C ends it")
        said = project.run("sh", "-ec", "\n".join([SOURCE, START, EMIT, LIST]))
        assert said.returncode == 0, said.stderr
        flow_id, emitted, _, row = said.stdout.splitlines()
        assert emitted.endswith(" emitted")
        assert row.startswith(f"{flow_id}\tshop/fulfil\t")

        store = SqlFlowStore.open(f"sqlite:///{tmp_path}/.celery-flows/flows.db")
        (flow,) = store.list_by_owner("default")
        until(lambda: has_ended(store, flow_id), "the flow has ended", within_seconds=60)
        store.close()
        shown = project.run("sh", "-ec", "\n".join([SOURCE, SHOW.replace("FLOW_ID", flow_id)]))
        assert shown.returncode == 0, shown.stderr
        assert str(flow.id) == flow_id
        assert 'result\t"paid 3600 for order-1, approved by Ada"\n' in shown.stdout

        dev.look()
        dev.send(signal.SIGINT)
        assert dev.ended() == 0
        until(lambda: not dev.left(), f"all have ended: {dev.left()}", within_seconds=20)


def has_ended(store: SqlFlowStore, flow_id: str) -> bool:
    return any(str(flow.id) == flow_id for flow in store.list_by_status(FlowStatus.FINISHED))


@tries(INSTALL_ALL)
def test_what_is_installed_for_the_first_page_can_be(tmp_path: Path) -> None:
    ended = run_pip(INSTALL_ALL, copied(tmp_path), "--dry-run")

    assert ended.returncode == 0, ended.stderr
    assert "Would install celery-flows-" in ended.stdout
    assert "does not provide the extra" not in ended.stdout + ended.stderr


INSTALL = "pip install ."
MIGRATE, WORKER, BEAT = "celery -A shop flow migrate", "celery -A shop worker", "celery -A shop beat"
DOCTOR = "celery -A shop flow doctor"

# What the snippet takes for granted: an order of the application's, in a table of its own beside ours.
BEFORE_THE_SNIPPET = """
from shop import flows, fulfil
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[str] = mapped_column(primary_key=True)


engine = create_engine(flows.store.engine.url)
Base.metadata.create_all(engine)
order = Order(id="order-2")
flows.emit("approval", "order-2", {"by": "Ada"})
"""
AFTER_THE_SNIPPET = """
with Session(engine) as session:
    assert session.scalars(select(Order.id)).all() == ["order-2"]
stored = handle.get()
assert (stored.owner_session_key, stored.idempotency_key) == ("tenant:acme", "order-2")
print(handle.result())
"""


@tries(INSTALL, MIGRATE, WORKER, BEAT, DOCTOR, "handle.result(timeout=60)")
def test_added_to_an_app_with_postgresql_and_redis(tmp_path: Path, databases: Databases, redis_server: Broker) -> None:
    write_shop(tmp_path)
    snippet = block_with("handle.result(timeout=60)")
    (tmp_path / "order.py").write_text(BEFORE_THE_SNIPPET + snippet + AFTER_THE_SNIPPET)
    installed = install(tmp_path)
    with databases.postgresql(empty=True) as url:
        settings = {"FLOW_STORE_URL": url, "CELERY_BROKER_URL": redis_server.url, "PYTHONPATH": str(installed)}
        project = shell(tmp_path, **settings)
        migrated = project.run(*MIGRATE.split())
        assert migrated.returncode == 0, migrated.stderr

        with in_background(project, WORKER) as worker, in_background(project, BEAT) as beat:
            ended = project.run(sys.executable, "order.py")
            assert ended.returncode == 0, f"{ended.stderr}\n{worker.output}"
            assert ended.stdout == "paid 3600 for order-2, approved by Ada\n"
            until(lambda: list(tmp_path.glob("celerybeat-schedule*")), "beat has its schedule", within_seconds=20)
            examined = project.run(*DOCTOR.split())
            assert (examined.returncode, examined.stdout) == (0, "ready, 0 findings\n")
            for running in (beat, worker):
                running.look()
                running.send(signal.SIGTERM)
                assert running.ended() == 0, running.output


def install(folder: Path) -> Path:
    """Installs the repository as the page says, but beside this Python's own packages."""
    target = folder / "installed"
    ended = run_pip(INSTALL, copied(folder), "--target", str(target))
    assert ended.returncode == 0, ended.stderr
    assert (target / "celery_flows/store/schema.py").is_file()
    return target


def copied(folder: Path) -> Path:
    """A copy of the repository: pip builds in the folder that it installs from."""
    source = folder / "source"
    source.mkdir()
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    return source


def run_pip(command: str, source: Path, *options: str) -> CompletedProcess[str]:
    """Runs a pip command there without network: what else is needed is here already."""
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    return shell(source).run(sys.executable, "-m", *shlex.split(command), *offline, *options)
