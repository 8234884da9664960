"""What a worker's parent process does for its children's leases: renews them, releases the dead's, hands back at its
end."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError
from celery.utils.imports import symbol_by_name
from celery.worker import state
from celery.worker.request import Request
from kombu.message import Message

from celery_flows import Run
from celery_flows.store import dispatch
from celery_flows.store.dispatch import StepClaim
from celery_flows.tasks.runtime import claim_token, worker_token
from celery_flows.worker.leases import Leases
from celery_flows.worker.pools import keep_inputs_out_of_events, tell_of_processes
from tests.support.bench import Bench


@dataclass(frozen=True)
class Running:
    """What of a Celery request matters."""

    id: str
    worker_pid: int
    type: str = "flows.step"


def end_nothing(pid: int) -> None:
    raise AssertionError(f"process {pid} is ended")


@pytest.fixture
def dead() -> int:
    """A process that has lived, and has died."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def held(bench: Bench, pid: int) -> StepClaim:
    """A step in the hands of this process."""

    @bench.task("work")
    def work() -> None: ...

    @bench.flows.flow("working")
    def working(run: Run) -> None:
        run.step(work)

    bench.drive(working.start().id)
    [(_, run_id)] = bench.claimable()
    claim = bench.store.run(dispatch.claim_step, run_id, claim_token(worker_token(pid, run_id)), 30.0)
    assert claim is not None
    return claim


def row(bench: Bench, claim: StepClaim) -> Any:
    [found] = [row for row in bench.rows(claim.flow_id) if row.run_id == claim.holder.run_id]
    return found


def test_what_died_between_two_looks_is_released_when_celery_tells_of_it(bench: Bench, dead: int) -> None:
    claim = held(bench, dead)
    leases = Leases(bench.runtime, end_nothing)
    leases.keep()
    assert row(bench, claim).worker == claim.holder.worker  # begun and dead since the last look: not noticed
    leases.lost(Running(claim.holder.run_id, dead))
    leases.keep()
    assert (row(bench, claim).worker, row(bench, claim).crash_count) == (None, 1)
    leases.keep()
    assert row(bench, claim).crash_count == 1
    bench.work()


def test_what_celery_takes_for_lost_and_lives_is_kept(bench: Bench) -> None:
    claim = held(bench, os.getpid())
    leases = Leases(bench.runtime, end_nothing)
    leases.lost(Running(claim.holder.run_id, os.getpid()))
    leases.keep()
    assert row(bench, claim).worker == claim.holder.worker
    bench.recover()


def test_a_stopping_workers_dead_have_not_crashed(bench: Bench, dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = held(bench, dead)
    monkeypatch.setattr(state, "active_requests", {Running(claim.holder.run_id, dead)})
    leases = Leases(bench.runtime, end_nothing)
    bench.runtime.stopping.set()
    leases.keep()
    assert row(bench, claim).worker == claim.holder.worker
    leases.hand_back()
    given = row(bench, claim)
    assert (given.worker, given.crash_count) == (None, 0)
    assert bench.sweep().published == 1


def test_the_end_hands_back_what_no_look_has_seen_and_nothing_of_the_living(bench: Bench, dead: int) -> None:
    claim, mine = held(bench, dead), os.getpid()
    drive = bench.rows(claim.flow_id)[0]
    assert bench.store.run(dispatch.list_holders, "another node/") == []
    living = claim_token(worker_token(mine, "living"))
    bench.call_driver(claim.flow_id)
    assert bench.store.run(dispatch.claim_drive, claim.flow_id, living, 30.0)
    Leases(bench.runtime, end_nothing).hand_back()
    assert row(bench, claim).worker is None
    assert [row.worker for row in bench.rows(claim.flow_id) if row.run_id == drive.run_id] == [living]
    bench.recover()


def test_celerys_request_for_a_flow_tells_of_its_lost_process(bench: Bench) -> None:
    told: list[Any] = []
    too_slow: list[Any] = []
    tell_of_processes(bench.app, told.append, too_slow.append)
    bench.app.finalize()
    for name in ("flows.drive", "flows.step"):
        task: Any = bench.app.tasks[name]
        made = object.__new__(symbol_by_name(task.Request))
        assert isinstance(made, Request)
        for error in (ValueError("no"), WorkerLostError("gone")):
            try:
                raise error
            except Exception:
                info = ExceptionInfo()
            with pytest.raises(AttributeError):  # there is no message behind it
                made.on_failure(info)
        for soft in (True, False):
            with suppress(AttributeError):
                made.on_timeout(soft, 1.0)
        assert (told, too_slow) == ([made], [made])
        told.clear()
        too_slow.clear()


def test_the_events_of_a_start_leave_its_input_out(bench: Bench) -> None:
    keep_inputs_out_of_events(bench.app)
    bench.app.finalize()
    task: Any = bench.app.tasks["flows.start"]
    headers = {"task": task.name, "id": "1", "argsrepr": "()", "kwargsrepr": "{'input': 'hunter2'}"}
    message = Message(
        body='[[], {"input": "hunter2"}, {}]', headers=headers, content_type="application/json",
        content_encoding="utf-8", accept=["application/json"],
    )  # fmt: skip
    request = symbol_by_name(task.Request)(message, app=bench.app, task=task, hostname="here")
    assert (request.argsrepr, request.kwargsrepr) == ("()", "{}")
    assert "hunter2" not in f"{request!r} {request} {request.info(safe=True)}"
