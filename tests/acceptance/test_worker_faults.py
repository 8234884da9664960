"""Workers die, and are told to stop, in the middle of their work: everything goes on, and what is recorded stays."""

from __future__ import annotations

import os
import signal
from datetime import timedelta

import pytest
import sqlalchemy as sa

from celery_flows import FlowDefinition, FlowHandle, FlowStatus
from celery_flows.store import operations as op
from celery_flows.store.engines import make_engine
from celery_flows.store.schema import VERSION_TABLE
from tests.acceptance.conftest import MakeTown, Town
from tests.support.brokers import Broker
from tests.support.databases import Databases
from tests.support.faults import closed_port
from tests.support.waiting import until
from tests.support.workers import Worker, is_alive

# Work in a flow's own process and in a Celery step, with each broker once at least.
everywhere = pytest.mark.parametrize(
    ("broker", "way"), [("redis", "step"), ("redis", "inline"), ("rabbitmq", "step")], indirect=["broker"]
)


def begin(town: Town, way: str) -> tuple[FlowHandle[str], int]:
    """Starts a flow and waits until its second step is held; gives the process that runs it."""
    flow: FlowDefinition[str, str] = town.shop.held_step if way == "step" else town.shop.held_inline
    handle = flow.start("work")
    until(lambda: town.shop.effects.read("work began"), "the step began", within_seconds=30)
    [began] = town.shop.effects.read("work began")
    pid: int = began["pid"]
    assert is_alive(pid)
    return handle, pid


def check_recovered(town: Town, handle: FlowHandle[str], *, struck: int) -> None:
    """The flow ends; what was recorded before ran once, the step in the dead process's hands once more."""
    assert handle.result(timeout=40) == "work"
    assert town.shop.effects.counts() == {"before": 1, "work began": 2, "work ended": 1, "after": 1}
    began = town.shop.effects.read("work began")
    assert began[0]["pid"] == struck != began[1]["pid"]
    assert not is_alive(struck)


@everywhere
def test_a_killed_child_is_noticed_and_its_work_done_again(town: Town, way: str) -> None:
    worker = town.worker()
    handle, pid = begin(town, way)
    assert pid in worker.children()
    town.shop.open_gate()  # for whoever comes next
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_alive(pid), "the child is dead")
    check_recovered(town, handle, struck=pid)
    assert worker.process.poll() is None


@everywhere
def test_a_killed_worker_is_followed_by_another(town: Town, way: str) -> None:
    worker = town.worker()
    handle, pid = begin(town, way)
    died = worker.kill()
    assert pid in died
    assert handle.status() is not FlowStatus.FINISHED
    town.shop.open_gate()
    town.worker()
    check_recovered(town, handle, struck=pid)


def test_work_that_kills_every_worker_is_given_up(make_town: MakeTown, redis_server: Broker) -> None:
    town = make_town(redis_server.url)
    town.worker(FLOW_MAX_CRASHES="2")
    handle = town.shop.held_step.start("deadly")
    for number in (1, 2):

        def began(times: int = number) -> bool:
            return len(town.shop.effects.read("deadly began")) == times

        until(began, "it began", within_seconds=30)
        os.kill(town.shop.effects.read("deadly began")[-1]["pid"], signal.SIGKILL)
    until(lambda: handle.status().is_terminal, "the flow is given up", within_seconds=30)
    flow = handle.get()
    assert (flow.status, (flow.error_json or {})["type"]) == (FlowStatus.FAILED, "StepLost")
    assert town.shop.effects.counts() == {"before": 1, "deadly began": 2}


@everywhere
def test_a_warm_shutdown_ends_the_step_and_loses_nothing(town: Town, way: str) -> None:
    worker = town.worker()
    handle, pid = begin(town, way)
    worker.terminate()
    until(lambda: "Warm shutdown" in worker.output, "the worker is stopping")
    assert is_alive(pid)
    town.shop.open_gate()
    assert worker.wait_exit() == 0
    town.worker()
    assert handle.result(timeout=40) == "work"
    assert town.shop.effects.counts() == {"before": 1, "work began": 1, "work ended": 1, "after": 1}


def test_leases_are_kept_during_a_warm_shutdown(make_town: MakeTown, redis_server: Broker) -> None:
    """A worker that is stopping may work on for longer than a lease, while others look for lost leases."""
    town = make_town(redis_server.url)
    worker = town.worker()
    handle, pid = begin(town, "step")
    town.worker()
    worker.terminate()
    until(lambda: "Warm shutdown" in worker.output, "the worker is stopping")
    lease_outlasted(town)
    assert town.shop.effects.counts()["work began"] == 1
    town.shop.open_gate()
    assert handle.result(timeout=40) == "work"
    assert town.shop.effects.counts() == {"before": 1, "work began": 1, "work ended": 1, "after": 1}
    assert worker.wait_exit() == 0
    assert not is_alive(pid)


def lease_outlasted(town: Town) -> None:
    """A lease's time and more passes by the database's clock, or the work was taken over meanwhile."""
    store = town.shop.flows.store
    began = store.run(op.now)
    lease = timedelta(seconds=1.5 * town.shop.flows.settings.lease_seconds)

    def outlasted() -> bool:
        return store.run(op.now) - began > lease or len(town.shop.effects.read("work began")) > 1

    until(outlasted, "a lease's time passes", within_seconds=30)


def test_a_step_longer_than_its_lease_is_not_taken_over(make_town: MakeTown, redis_server: Broker) -> None:
    town = make_town(redis_server.url)
    for _ in range(2):
        town.worker()
    handle, _ = begin(town, "step")
    lease_outlasted(town)
    town.shop.open_gate()
    assert handle.result(timeout=30) == "work"
    assert town.shop.effects.counts() == {"before": 1, "work began": 1, "work ended": 1, "after": 1}


# ---- workers that must not start ------------------------------------------------------------------------------------


def refusal(worker: Worker) -> str:
    """What a worker that cannot start says: one sentence, and no traceback."""
    assert worker.wait_exit(60) != 0
    said = [line for line in worker.output.splitlines() if line.startswith("Error: ")]
    assert len(said) == 1, worker.output
    assert "Traceback" not in worker.output
    return said[0]


def test_a_worker_without_its_database_says_so_and_ends(make_town: MakeTown, redis_server: Broker) -> None:
    town = make_town(redis_server.url)
    url = f"postgresql://me:hunter2@127.0.0.1:{closed_port()}/nowhere"
    worker = town.worker(ready=False, FLOW_STORE_URL=url)
    said = refusal(worker)
    assert "the database could not be reached" in said
    assert "hunter2" not in worker.output


def test_a_worker_without_tables_says_what_makes_them(
    make_town: MakeTown, redis_server: Broker, databases: Databases
) -> None:
    town = make_town(redis_server.url)
    with databases.postgresql(empty=True) as url:
        said = refusal(town.worker(ready=False, FLOW_STORE_URL=url))
    assert "the database has no celery-flows tables: run `celery -A APP flow migrate`" in said


def test_a_worker_with_an_old_schema_says_what_mends_it(
    make_town: MakeTown, redis_server: Broker, databases: Databases
) -> None:
    town = make_town(redis_server.url)
    with databases.postgresql() as url:
        engine = make_engine(url)
        with engine.begin() as connection:
            connection.execute(sa.text(f"UPDATE {VERSION_TABLE} SET version_num = 'older'"))
        engine.dispose()
        said = refusal(town.worker(ready=False, FLOW_STORE_URL=url))
    assert "the database is at schema older, this version needs" in said
    assert "run `celery -A APP flow migrate`" in said


def test_a_worker_of_greenlets_is_refused(make_town: MakeTown, redis_server: Broker) -> None:
    said = refusal(make_town(redis_server.url).worker("-P", "gevent", ready=False))
    assert "worker_pool: flows do not run under gevent" in said
    assert "use prefork, threads or solo" in said


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("FLOW_LEASE_SECONDS", "hunter2", "flow_lease_seconds: "),
        ("FLOW_STORE_URI", "hunter2", "FLOW_STORE_URI: is no setting; did you mean FLOW_STORE_URL?"),
    ],
)
def test_a_worker_with_a_bad_setting_says_which(
    make_town: MakeTown, redis_server: Broker, name: str, value: str, said: str
) -> None:
    worker = make_town(redis_server.url).worker(ready=False, **{name: value})
    assert said in refusal(worker)
    assert "hunter2" not in worker.output
