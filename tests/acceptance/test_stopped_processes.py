"""Processes stand still, as on a machine that freezes, in a step or inside a transaction: others take over, and what
the first writes when it goes on is refused."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from celery_flows import FlowHandle
from celery_flows.store import FlowManager, dispatch
from celery_flows.tasks.maintenance import sweep
from tests.acceptance.conftest import MakeTown, Town
from tests.acceptance.test_worker_faults import begin, lease_outlasted
from tests.support.brokers import Broker
from tests.support.databases import is_locked
from tests.support.standstill import ARMED
from tests.support.waiting import until
from tests.support.workers import state_of

LOCK_TIMEOUT, IDLE_TIMEOUT = 2.0, 10.0  # seconds, as in the connection's options
NEVER = "3600"  # seconds
SLACK = 4.0  # of a machine with much to do


@pytest.mark.parametrize(("database", "way"), [("postgresql", "step"), ("postgresql", "inline"), ("sqlite", "inline")])
def test_what_a_stopped_step_writes_after_a_takeover_is_refused(
    make_town: MakeTown, redis_server: Broker, request: pytest.FixtureRequest, database: str, way: str
) -> None:
    town = make_town(redis_server.url, request.getfixturevalue(f"{database}_url"))
    first = town.worker()
    handle, pid = begin(town, way)
    assert pid in first.freeze_between_writes(town.shop.flows.store.engine.url)
    town.shop.open_gate()
    town.worker()
    assert handle.result(timeout=40) == "work"
    assert state_of(pid) == "T"
    told = history(town, handle)
    first.thaw()
    until(lambda: len(town.shop.effects.read("work ended")) == 2, "the first goes on")
    refused = "its lease was lost, its outcome is refused" if way == "step" else "driving stops (LeaseLost)"
    until(lambda: refused in first.output, "its outcome is refused")
    assert history(town, handle) == told
    assert len(recorded(town, handle)) == 3
    assert town.shop.effects.counts() == {"before": 1, "work began": 2, "work ended": 2, "after": 1}


def history(town: Town, handle: FlowHandle[Any]) -> list[Any]:
    """Flow, steps and events as they are stored."""
    store = town.shop.flows.store
    return [store.get(handle.id), store.list_steps(handle.id), store.list_events(handle.id, None)]


def recorded(town: Town, handle: FlowHandle[Any]) -> list[str]:
    """The run ids of the successes that were recorded; each must be there once."""
    events = town.shop.flows.store.list_events(handle.id, None)
    run_ids = [event.payload_json["run_id"] for event in events if event.kind == "step_succeeded"]
    assert len(set(run_ids)) == len(run_ids)
    return run_ids


# ---- inside a transaction -------------------------------------------------------------------------------------------

# On PostgreSQL a transition is one statement, so a process that stands still is inside a transaction only where there
# are several. These hold the flow's row and its drive row, and a step's rows.
DRAIN = "SET open_members=(flow_dispatch.open_members -"
RETRY = "UPDATE flow_steps SET status="
RECORD = "INSERT INTO flow_steps"


def arm(town: Town, **strikes: str) -> None:
    """Has workers' processes stand still before they commit these statements, each once."""
    folder = town.directory / "armed"
    folder.mkdir(exist_ok=True)
    for name, statement in strikes.items():
        strike(folder, name, statement)
    town.environment[ARMED] = str(folder)


def strike(folder: Path, name: str, statement: str) -> None:
    written = folder.with_name(f"{name}.new")
    written.write_text(statement)
    written.rename(folder / name)


def stands_still(town: Town, name: str) -> dict[str, Any]:
    """What the process says that stands still now."""
    said = until(lambda: town.shop.effects.read(f"stands still in {name}"), f"it commits {name}", within_seconds=30)
    until(lambda: state_of(said[0]["pid"]) == "T", "it stands still")
    return said[0]


class Witness:
    """Another session in the database, that sees who waits and who is there."""

    def __init__(self, url: str) -> None:
        self.engine = sa.create_engine(url, poolclass=NullPool)
        self.waits: dict[tuple[int, datetime], float] = {}  # of each statement, how long it was seen to wait

    def look(self) -> None:
        """Notes how long which statements have waited for a lock by now."""
        waiting = sa.text(
            "SELECT pid, query_start, extract(epoch FROM clock_timestamp() - query_start) FROM pg_stat_activity "
            "WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        with self.engine.connect() as connection:
            for pid, since, seconds in connection.execute(waiting):
                self.waits[pid, since] = max(float(seconds), self.waits.get((pid, since), 0.0))

    def has(self, backend: int) -> bool:
        """Whether this session is there, inside a transaction."""
        there = sa.text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid AND state = 'idle in transaction'")
        with self.engine.connect() as connection:
            return bool(connection.scalar(there, {"pid": backend}))


def test_a_process_that_stands_still_inside_a_transaction_holds_up_its_own_flow_for_a_bounded_time(
    make_town: MakeTown, redis_server: Broker, postgresql_url: str
) -> None:
    """The server ends a session that is idle inside a transaction; till then whoever wants the row waits for
    lock_timeout, again and again, and all other flows go on."""
    here, there = make_town(redis_server.url), make_town(redis_server.url)  # two queues, one database
    witness = Witness(postgresql_url)
    there.worker("-c", "3", FLOW_SWEEP_SECONDS=NEVER)
    arm(here, drain=DRAIN, retry=RETRY)
    first = here.worker(FLOW_SWEEP_SECONDS=NEVER)
    undone, retried = start_cancelled(here), here.shop.retried.start("letter")
    stopped = [stands_still(here, name) for name in ("drain", "retry")]
    assert {each["pid"] for each in stopped} <= set(first.freeze())
    since = claimed_at(here, undone)[-1]

    runtime = there.shop.flows.runtime
    hint = runtime.store.run(dispatch.find_hint, str(undone.id))
    assert hint is not None
    assert runtime.publisher.publish(hint) == 1
    check_others(there)
    assert all(witness.has(each["backend"]) for each in stopped), "others were to be served meanwhile"
    here.worker(ready=False, FLOW_SWEEP_SECONDS=NEVER)  # a step stays with the queue it was scheduled for

    def ended() -> bool:
        witness.look()
        sweep(runtime)
        return undone.status().is_terminal and retried.status().is_terminal

    until(ended, "both flows are taken over and end", within_seconds=40)
    assert (undone.status(), retried.result(0)) == ("cancelled", "letter")
    assert [state_of(each["pid"]) for each in stopped] == ["T", "T"]
    assert not any(witness.has(each["backend"]) for each in stopped)

    assert len(witness.waits) > 1  # it waited, gave up, and waited again
    assert max(witness.waits.values()) < LOCK_TIMEOUT + 0.5
    held_up = (claimed_at(here, undone)[-1] - since).total_seconds()
    assert LOCK_TIMEOUT < held_up < IDLE_TIMEOUT + LOCK_TIMEOUT + SLACK

    told = [history(here, handle) for handle in (undone, retried)]
    first.thaw()
    until(lambda: "driving stops (LeaseLost)" in first.output, "the driver is refused")
    until(lambda: "its lease was lost, its retry is not recorded" in first.output, "the retry is refused")
    assert [history(here, handle) for handle in (undone, retried)] == told
    assert (len(recorded(here, undone)), len(recorded(here, retried))) == (1, 3)
    effects = here.shop.effects.counts() + there.shop.effects.counts()
    expected = {"card undone": 1, "before the retry": 1, "letter 0": 2, "letter 1": 1, "after the retry": 1, "card": 0}
    assert {effect: effects[effect] for effect in expected} == expected


def start_cancelled(town: Town) -> FlowHandle[None]:
    """A flow that is cancelled as soon as it is there; one message tells of it."""
    store = town.shop.flows.store
    with store.engine.begin() as connection:
        handle = town.shop.undone.start("card", session=connection)
        FlowManager(store.using(connection)).request_cancel(handle.id)
    return handle


def claimed_at(town: Town, handle: FlowHandle[Any]) -> list[datetime]:
    """When drivers took this flow, by the database's clock."""
    events = town.shop.flows.store.list_events(handle.id, None)[::-1]
    return [event.at for event in events if event.kind in ("started", "resumed", "reclaimed")]


def check_others(town: Town) -> None:
    """Another flow runs to its end."""
    town.shop.open_gate()
    assert town.shop.held_inline.start("other").result(timeout=20) == "other"


@pytest.mark.parametrize("ending", ["goes on", "is killed"])
def test_a_process_that_stands_still_as_sqlites_one_writer_stops_the_others_for_as_long_only(
    make_town: MakeTown, redis_server: Broker, sqlite_url: str, ending: str
) -> None:
    """They can read meanwhile; afterwards they go on, and nothing is torn."""
    town = make_town(redis_server.url, sqlite_url)
    arm(town)
    first = town.worker()
    handle, pid = begin(town, "inline")
    strike(town.directory / "armed", "record", RECORD)
    town.shop.open_gate()
    assert stands_still(town, "record")["pid"] == pid
    second = town.worker(ready=False)
    told = history(town, handle)
    assert is_locked(sqlite_url)
    lease_outlasted(town)
    assert is_locked(sqlite_url)
    assert history(town, handle) == told  # nobody could take over, nor be refused
    if ending == "goes on":
        first.thaw()
    else:
        first.kill()
    second.wait_ready()
    assert handle.result(timeout=40) == "work"
    runs = 1 if ending == "goes on" else 2  # what it was about to commit when it was killed is not recorded
    assert town.shop.effects.counts() == {
        "before": 1, "work began": runs, "work ended": runs, "after": 1, "stands still in record": 1,
    }  # fmt: skip
    assert len(recorded(town, handle)) == 3
