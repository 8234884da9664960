"""A process forks while another of its threads is in a transaction: the child finds a database that it can write."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import Connection

from celery_flows.store import Flow, SqlFlowStore
from celery_flows.store.engines import make_engine
from celery_flows.store.forks import ForkGate
from celery_flows.store.operations import insert_flow, writes
from tests.support.waiting import until


def a_flow() -> Flow:
    return Flow(controller_id="forked", owner_session_key="me")


def wrote_at_once(url: str) -> bool:
    """Whether a forked child can write within a moment."""
    child = os.fork()
    if child == 0:  # the child: nothing of the parent's may run on
        began = time.monotonic()
        try:
            store = SqlFlowStore(make_engine(url))
            store.insert(a_flow())
            os._exit(0 if time.monotonic() - began < 5 else 3)
        except BaseException:
            os._exit(4)
    return os.waitpid(child, 0)[1] == 0


def test_a_fork_in_the_middle_of_a_transaction_waits_for_its_end(sqlite_url: str) -> None:
    store = SqlFlowStore(make_engine(sqlite_url))
    inside, leave = threading.Event(), threading.Event()

    @writes
    def slowly(conn: Connection) -> None:
        insert_flow(conn, a_flow())
        inside.set()
        leave.wait(30)

    writer = threading.Thread(target=store.run, args=(slowly,))
    writer.start()
    assert inside.wait(10)
    threading.Timer(0.5, leave.set).start()
    assert not leave.is_set()
    assert wrote_at_once(sqlite_url)
    writer.join()
    assert leave.is_set(), "the child was forked while the transaction was open"
    store.close()


def test_transactions_wait_for_a_fork_and_go_on_after_it(sqlite_url: str) -> None:
    gate = ForkGate()
    gate._close()
    through = threading.Event()

    def transact() -> None:
        with gate.transaction():
            through.set()

    other = threading.Thread(target=transact)
    other.start()
    assert not through.wait(0.2)
    gate._open()
    assert through.wait(10)
    other.join()


def test_who_forks_within_a_transaction_of_its_own_does_not_wait_for_itself(tmp_path: Path) -> None:
    gate = ForkGate()
    with gate.transaction(), gate.transaction():
        began = time.monotonic()
        gate._close()
        gate._open()
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("threads", [8])
def test_transactions_go_through_side_by_side(threads: int) -> None:
    gate, inside = ForkGate(), threading.Barrier(threads + 1)

    def transact() -> None:
        with gate.transaction():
            inside.wait(10)

    all_threads = [threading.Thread(target=transact) for _ in range(threads)]
    for thread in all_threads:
        thread.start()
    inside.wait(10)  # breaks, if one kept another out
    for thread in all_threads:
        thread.join()
    until(lambda: gate._open_transactions == 0, "all have ended")
