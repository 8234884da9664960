"""An application's open transaction holds a worker up, for however long: nothing that was done is done again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from celery_flows import FlowHandle, FlowStepStatus, Run, StoreError
from celery_flows.store import SqlFlowStore, dispatch
from celery_flows.store.engines import parse_url
from celery_flows.tasks.steps import cancel_stopped
from tests.support.bench import Bench
from tests.support.waiting import until, waits_for_lock

GIVEN_UP_BEFORE = "an open transaction holds a lock for long"  # in the log

asks = pytest.mark.parametrize("ask", [FlowHandle.pause, FlowHandle.unpause, FlowHandle.cancel])


@pytest.fixture
def bench(postgresql_url: str) -> Iterator[Bench]:
    """A worker that waits for locks by short turns, as others do by turns of two seconds. (SQLite has one writer.)"""
    engine = sa.create_engine(parse_url(postgresql_url), connect_args={"options": "-c timezone=UTC -c lock_timeout=50"})
    with closing(Bench(postgresql_url, store=SqlFlowStore(engine))) as bench:
        yield bench
        bench.audit()


@pytest.fixture
def request_(bench: Bench) -> Iterator[Session]:
    """What a request has open, over the application's own engine."""
    engine = sa.create_engine(bench.store.engine.url)
    with Session(engine) as session:
        yield session
    engine.dispose()


class Once:
    """What a step does, in whose midst a request asks something of the flow and does not commit."""

    def __init__(self, bench: Bench, ask: Callable[..., Any], session: Session) -> None:
        self.bench, self.ask, self.session = bench, ask, session
        self.handle: FlowHandle[Any] | None = None

    def __call__(self) -> str:
        self.bench.effects.append("charged")
        if len(self.bench.effects) == 1:
            assert self.handle is not None
            self.ask(self.handle, session=self.session)
        return "charged"


def held_up(bench: Bench, work: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> threading.Thread:
    """Works in a thread; returns when what came of it has waited for longer than any other write would."""
    thread = threading.Thread(target=work)
    thread.start()
    until(lambda: GIVEN_UP_BEFORE in caplog.text, "it is tried again and again", within_seconds=30)
    until(lambda: waits_for_lock(bench.store.engine), "and still is", within_seconds=30)
    return thread


def charging(bench: Bench, body: Any) -> Any:
    @bench.flows.flow("charges")
    def charges(run: Run) -> str:
        return str(run.step(body))

    return charges


@asks
@pytest.mark.parametrize("commits", [True, False], ids=["commits", "rolls back"])
def test_a_step_that_was_done_is_recorded_when_the_transaction_has_ended(
    bench: Bench, request_: Session, caplog: pytest.LogCaptureFixture, ask: Callable[..., Any], commits: bool
) -> None:
    charge = Once(bench, ask, request_)
    handle = charge.handle = charging(bench, charge).start()
    driver = held_up(bench, lambda: bench.drive(handle.id), caplog)
    request_.commit() if commits else request_.rollback()
    driver.join(30)
    assert not driver.is_alive()
    bench.recover()
    [step] = bench.store.list_steps(handle.id)
    assert step.status is FlowStepStatus.SUCCEEDED
    assert bench.effects == ["charged"]
    assert bench.kinds(handle.id).count("started") == 1
    assert "reclaimed" not in bench.kinds(handle.id)


def test_a_worker_that_is_told_to_stop_records_what_it_has_done_all_the_same(
    bench: Bench, request_: Session, caplog: pytest.LogCaptureFixture
) -> None:
    charge = Once(bench, FlowHandle.pause, request_)
    handle = charge.handle = charging(bench, charge).start()
    driver = held_up(bench, lambda: bench.drive(handle.id), caplog)
    bench.runtime.stopping.set()
    request_.rollback()
    driver.join(30)
    assert not driver.is_alive()
    [step] = bench.store.list_steps(handle.id)
    assert (step.status, bench.effects) == (FlowStepStatus.SUCCEEDED, ["charged"])


@pytest.mark.parametrize("ask", [FlowHandle.unpause, FlowHandle.cancel])
def test_so_is_a_celery_step(
    bench: Bench, request_: Session, caplog: pytest.LogCaptureFixture, ask: Callable[..., Any]
) -> None:
    body = Once(bench, ask, request_)

    @bench.task("charge")
    def charge() -> str:
        return body()

    handle = body.handle = charging(bench, charge).start()
    bench.drive(handle.id)
    [step] = bench.store.list_steps(handle.id)
    worker = held_up(bench, lambda: bench.run_step(step.run_id), caplog)
    request_.rollback()
    worker.join(30)
    assert not worker.is_alive()
    assert bench.finish(handle) == "charged"
    assert bench.effects == ["charged"]


def test_who_renews_the_leases_of_others_is_not_held_up(bench: Bench, request_: Session) -> None:
    """A parent process that records that a child's step was cut off: it asks again at its next look."""

    @bench.task("charge")
    def charge() -> None: ...

    handle = charging(bench, charge).start()
    bench.drive(handle.id)
    [step] = bench.store.list_steps(handle.id)
    bench.store.run(dispatch.claim_step, step.run_id, "node/1/request/claim", 60.0)
    handle.unpause(session=request_)
    with pytest.raises(StoreError):
        cancel_stopped(bench.runtime, "node/1/request")
    request_.rollback()
    assert cancel_stopped(bench.runtime, "node/1/request")
    bench.work()
