"""The database goes away while workers have work in hand: what is recorded stays, what was done is recorded later, and
nothing is torn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from celery_flows import FlowHandle
from tests.acceptance.conftest import MakeTown, Town
from tests.acceptance.test_worker_faults import begin
from tests.support.brokers import Broker
from tests.support.own_postgresql import OwnPostgresql
from tests.support.waiting import until
from tests.support.workers import Worker, is_alive

PATIENT = "20"  # seconds of a lease: an outcome waits for half of that; three seconds is short on a busy machine
MANY = 25
ONCE = {"before": 1, "work began": 1, "work ended": 1, "after": 1}


@pytest.fixture(scope="module")
def server() -> Iterator[OwnPostgresql]:
    """A PostgreSQL server that is the tests' to kill."""
    own = OwnPostgresql()
    try:
        yield own
    finally:
        own.close()


def misses_its_database(worker: Worker) -> bool:
    """Whether it says so: its threads look for work more often than that is told."""
    return "is tried again" in worker.output


@pytest.mark.parametrize("way", ["step", "inline"])
def test_what_is_done_while_the_database_is_away_is_recorded_when_it_is_back(
    make_town: MakeTown, redis_server: Broker, server: OwnPostgresql, way: str
) -> None:
    town = make_town(redis_server.url, server.new_database())
    worker = town.worker(FLOW_LEASE_SECONDS=PATIENT)
    handle, pid = begin(town, way)
    postmaster = server.postmaster
    server.kill()
    until(lambda: not is_alive(postmaster), "the server is dead")
    until(lambda: misses_its_database(worker), "the worker notices", within_seconds=20)
    town.shop.open_gate()
    until(lambda: town.shop.effects.read("work ended"), "the step ends without its database")
    server.start()
    assert server.postmaster != postmaster
    assert handle.result(timeout=40) == "work"
    assert town.shop.effects.counts() == ONCE
    assert is_alive(pid)
    assert worker.process.poll() is None


@pytest.mark.parametrize("way", ["step", "inline"])
def test_a_database_that_is_away_for_longer_than_a_lease_costs_the_work_in_hand_only(
    make_town: MakeTown, redis_server: Broker, server: OwnPostgresql, way: str
) -> None:
    town = make_town(redis_server.url, server.new_database())
    worker = town.worker()
    handle, _ = begin(town, way)
    postmaster = server.postmaster
    server.kill()
    until(lambda: not is_alive(postmaster), "the server is dead")
    town.shop.open_gate()
    given_up = "driving stops (StoreError)" if way == "inline" else "raised unexpected: StoreError"
    until(lambda: given_up in worker.output, "the worker gives the outcome up", within_seconds=30)
    server.start()
    assert server.postmaster != postmaster
    assert handle.result(timeout=40) == "work"
    assert town.shop.effects.counts() == {**ONCE, "work began": 2, "work ended": 2}


def await_tick(town: Town, number: int) -> None:
    until(lambda: town.shop.effects.read(f"tick {number}"), "the flow gets so far", within_seconds=30)


def check_many(town: Town, handle: FlowHandle[int]) -> None:
    """Every step was done once, and recorded once."""
    assert handle.result(timeout=60) == sum(range(MANY))
    counts = town.shop.effects.counts()
    assert {effect: count for effect, count in counts.items() if effect.startswith("tick")} == {
        f"tick {number}": 1 for number in range(MANY)
    }
    assert len(town.shop.flows.store.list_steps(handle.id)) == MANY


def test_a_driver_goes_on_through_crashes_of_the_database(
    make_town: MakeTown, redis_server: Broker, server: OwnPostgresql
) -> None:
    town = make_town(redis_server.url, server.new_database())
    town.worker(FLOW_LEASE_SECONDS=PATIENT)
    handle = town.shop.many_inline.start(MANY)
    postmasters = [server.postmaster]
    for number in (4, 11):
        await_tick(town, number)
        server.restart()
        postmasters.append(server.postmaster)
    assert len(set(postmasters)) == 3
    assert not any(is_alive(pid) for pid in postmasters[:-1])
    assert handle.status() == "running", "the server was to crash in the middle"
    check_many(town, handle)


def test_a_worker_that_loses_all_its_connections_goes_on_with_what_it_has_in_hand(
    make_town: MakeTown, redis_server: Broker, postgresql_url: str
) -> None:
    town = make_town(redis_server.url)
    worker = town.worker("-c", "3", FLOW_LEASE_SECONDS=PATIENT)
    held = town.shop.held_step.start("work")
    many = town.shop.many_inline.start(MANY)
    until(lambda: town.shop.effects.read("work began"), "the step began", within_seconds=30)
    for number in (4, 8, 12):
        await_tick(town, number)
        terminate_all(town, postgresql_url)
    assert (held.status(), many.status()) == ("running", "running")
    town.shop.open_gate()
    assert held.result(timeout=40) == "work"
    check_many(town, many)
    counts = town.shop.effects.counts()
    assert {effect: counts[effect] for effect in ONCE} == ONCE
    assert worker.process.poll() is None


def terminate_all(town: Town, url: str) -> None:
    """Ends all sessions that the worker has, and sees them gone."""
    town.shop.flows.store.close()  # so that the others are the worker's
    others = "datname = current_database() AND pid <> pg_backend_pid()"
    engine = sa.create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        ended = connection.execute(
            sa.text(f"SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
        ).all()
        assert len(ended) > 1  # of its parent and of a child, at least
        assert all(struck for _, struck in ended)
        there = sa.text("SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(:pids)")
        pids = [pid for pid, _ in ended]
        until(lambda: connection.scalar(there, {"pids": pids}) == 0, "its sessions are gone")
