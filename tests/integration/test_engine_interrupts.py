"""What an interrupt does to a step, in this process: it is real, and comes as the worker's parent would send it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from celery.worker import state
from sqlalchemy.orm import Session

from celery_flows import FlowCancelled, FlowFailed, FlowHandle, FlowStepStatus, Retry, Run, StepFailed
from celery_flows.store import dispatch
from celery_flows.store.clock import boottime
from celery_flows.tasks import interrupts as interrupts_module
from celery_flows.tasks.interrupts import SIGNAL, Interrupted, Interrupts
from celery_flows.tasks.runtime import worker_token
from celery_flows.tasks.timeout import TimeIsUp, time_limit
from celery_flows.worker import stops as stops_module
from celery_flows.worker.stops import Stops
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench

FOREVER = 60.0  # seconds; a test that waits for it has failed
ME = worker_token(os.getpid(), "request")
CLAIM = "node/1/request/0a0b0c0d"


@pytest.fixture(autouse=True)
def _signal() -> Iterator[None]:
    before = signal.getsignal(SIGNAL)
    yield
    signal.signal(SIGNAL, before)


@pytest.fixture
def interrupts() -> Interrupts:
    made = Interrupts()
    made.share()
    made.listen()
    return made


@pytest.fixture
def bench(make_bench: MakeBench) -> Bench:
    """A bench in a process that can be interrupted."""
    bench = make_bench()
    bench.runtime.interrupts.share()
    bench.runtime.interrupts.listen()
    return bench


def strike() -> None:
    os.kill(os.getpid(), SIGNAL)


def cancelled(handle: FlowHandle[Any]) -> None:
    with pytest.raises(FlowCancelled):
        handle.result(0)


# ---- what is struck -------------------------------------------------------------------------------------------------


def test_a_body_is_struck_once_and_nothing_after_it(interrupts: Interrupts) -> None:
    def body() -> None:
        with interrupts.body(CLAIM):
            assert interrupts.running(os.getpid()) == ("0a0b0c0d", 1)
            with suppress(BaseException):
                strike()
                time.sleep(FOREVER)
            strike()
            strike()
            raise LookupError  # what the body made of it

    with pytest.raises(Interrupted):
        body()
    assert interrupts.running(os.getpid()) is None
    strike()
    with interrupts.body(CLAIM):
        assert interrupts.running(os.getpid()) == ("0a0b0c0d", 2)


def test_a_body_that_comes_to_a_result_all_the_same_has_it(interrupts: Interrupts) -> None:
    with interrupts.body(CLAIM), suppress(Interrupted):
        strike()
        time.sleep(FOREVER)


def test_what_ends_the_process_is_not_taken_for_the_interrupt(interrupts: Interrupts) -> None:
    def body() -> None:
        with interrupts.body(CLAIM):
            with suppress(Interrupted):
                strike()
                time.sleep(FOREVER)
            raise SystemExit

    with pytest.raises(SystemExit):
        body()


def test_a_hail_of_signals_strikes_within_bodies_only(interrupts: Interrupts) -> None:
    """In a body, or not at all: never on the way in or out, where it would leave things half done."""
    hail = f"import os\nwhile True: os.kill({os.getpid()}, {int(SIGNAL)})"
    sender = subprocess.Popen([sys.executable, "-c", hail])
    struck, deadline = 0, boottime() + 20.0
    try:
        while struck < 100 and boottime() < deadline:
            try:
                with interrupts.body(CLAIM):
                    sum(range(100))
            except Interrupted:
                struck += 1
            assert interrupts.running(os.getpid()) is None
            assert interrupts._body is None
    finally:
        sender.kill()
        sender.wait()
    assert struck == 100


def test_an_application_that_uses_the_signal_keeps_it() -> None:
    received: list[int] = []
    signal.signal(SIGNAL, lambda number, _: received.append(number))
    interrupts = Interrupts()
    interrupts.share()
    interrupts.listen()
    with interrupts.body(CLAIM):
        assert interrupts.running(os.getpid()) is None  # so its worker's parent sends it nothing
        strike()
    assert received == [SIGNAL]


def test_threads_are_not_interrupted(interrupts: Interrupts) -> None:
    seen: list[Any] = []

    def work() -> None:
        with interrupts.body(CLAIM):
            seen.append(interrupts.running(os.getpid()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]


def test_a_process_that_shares_nothing_is_not_interrupted() -> None:
    interrupts = Interrupts()
    interrupts.listen()
    with interrupts.body(CLAIM):
        assert interrupts.running(os.getpid()) is None
        strike()


# ---- what becomes of the step ---------------------------------------------------------------------------------------


Body = Callable[[Callable[[], None]], None]


# SQLite has one writer: while a transaction runs there, nobody can ask for a cancel.
on_each_database = pytest.mark.parametrize(
    ("engine_database", "kind"),
    [(database, kind) for database in ("sqlite", "postgresql") for kind in ("inline", "celery", "transaction")
     if (database, kind) != ("sqlite", "transaction")],
    indirect=["engine_database"],
)  # fmt: skip


def flow_with(bench: Bench, kind: str, body: Callable[[str], str]) -> Any:
    """A flow whose one step, of this kind, does this; it cleans up."""
    task = bench.task("body")(body)

    def in_transaction(session: Session, flow_id: str) -> str:
        session.execute(sa.text("CREATE TABLE struck (id int)"))
        return body(flow_id)

    @bench.flows.flow("struck")
    def struck(run: Run) -> str:
        once = run.options(retry=Retry(1))
        try:
            if kind == "transaction":
                return str(once.transaction(in_transaction, str(run.flow_id)))
            return once.step(task if kind == "celery" else body, str(run.flow_id))
        except FlowCancelled:
            run.step(bench.effects.append, "cleaned up")
            raise

    return struck


@on_each_database
def test_an_interrupted_attempt_of_a_cancelled_flow_has_no_outcome(bench: Bench, kind: str) -> None:
    def body(flow_id: str) -> str:
        bench.effects.append("began")
        bench.flows.handle(flow_id).cancel()
        strike()
        time.sleep(FOREVER)
        return ""

    handle = flow_with(bench, kind, body).start()
    bench.work()
    cancelled(handle)
    assert bench.effects == ["began", "cleaned up"]
    steps = {step.task: step.status for step in bench.store.list_steps(handle.id)}
    assert steps == {"append": "succeeded", **({"body": FlowStepStatus.CANCELLED} if kind == "celery" else {})}
    assert not {"step_failed", "step_retrying"} & set(bench.kinds(handle.id))
    assert not sa.inspect(bench.store.engine).has_table("struck")


@on_each_database
def test_an_interrupt_that_was_meant_for_another_costs_nothing(bench: Bench, kind: str) -> None:
    """The attempt is made again, and none of the step's attempts are used up."""

    def body(flow_id: str) -> str:
        bench.effects.append("began")
        if len(bench.effects) < 3:
            strike()
            time.sleep(FOREVER)
        return "done"

    handle = flow_with(bench, kind, body).start()
    bench.work()
    assert handle.result(0) == "done"
    assert bench.effects == ["began"] * 3
    [step] = bench.store.list_steps(handle.id)
    assert step.attempt == 1
    if kind == "transaction":
        with bench.store.engine.begin() as connection:
            connection.execute(sa.text("DROP TABLE struck"))


@pytest.mark.parametrize("kind", ["inline", "celery"])
def test_an_interrupted_step_whose_flow_was_ended_by_hand_is_not_begun_again(bench: Bench, kind: str) -> None:
    def body(flow_id: str) -> str:
        bench.effects.append("began")
        bench.flows.manager.cancel(bench.flows.handle(flow_id).id)
        strike()
        time.sleep(FOREVER)
        return ""

    handle = flow_with(bench, kind, body).start()
    bench.work()
    cancelled(handle)
    assert bench.effects == ["began"]


def test_a_step_that_ends_in_spite_of_the_interrupt_is_recorded(bench: Bench) -> None:
    """Its effect is there, so what cleans up must see it."""

    def body(flow_id: str) -> str:
        bench.flows.handle(flow_id).cancel()
        with suppress(BaseException):
            strike()
            time.sleep(FOREVER)
        return "charged"

    handle = flow_with(bench, "celery", body).start()
    bench.work()
    cancelled(handle)
    [step] = [step for step in bench.store.list_steps(handle.id) if step.task == "body"]
    assert (step.status, step.result_json) == (FlowStepStatus.SUCCEEDED, "charged")


@pytest.mark.parametrize("way", ["cleanup", "failure", "by itself"])
@pytest.mark.parametrize("kind", ["inline", "celery"])
def test_what_cleans_up_or_undoes_cannot_be_interrupted(bench: Bench, way: str, kind: str) -> None:
    def undo(flow_id: str) -> None:
        bench.effects.append(bench.runtime.interrupts.running(os.getpid()))
        with suppress(Exception):
            bench.flows.handle(flow_id).cancel()
        strike()

    undo_elsewhere = bench.task("undo")(undo)

    @bench.flows.flow("undoes")
    def undoes(run: Run) -> None:
        run.on_failure(undo_elsewhere if kind == "celery" else undo, str(run.flow_id))
        if way == "by itself":
            run.undo()
        elif way == "failure":
            raise LookupError
        else:
            run.sleep(timedelta(days=1))

    handle = undoes.start()
    bench.work()
    if way == "cleanup":
        handle.cancel()
        bench.work()
    with pytest.raises((FlowCancelled, FlowFailed)):
        handle.result(0)
    assert bench.effects == [None]


def test_a_gather_with_members_out_is_settled_before_the_flow_is_told(bench: Bench) -> None:
    """Losers of a race still run when the step after it is interrupted: cleanup waits for them."""

    @bench.task("quick")
    def quick() -> int:
        return 1

    @bench.task("slow")
    def slow() -> int:
        return 2

    def struck(flow_id: str) -> None:
        bench.flows.handle(flow_id).cancel()
        strike()
        time.sleep(FOREVER)

    @bench.flows.flow("race")
    def race(run: Run) -> None:
        run.first([quick.s(), slow.s()])
        try:
            run.step(struck, str(run.flow_id))
        except FlowCancelled:
            run.step(bench.effects.append, "cleaned up")
            raise

    handle = race.start()
    bench.drive(handle.id)
    out = {step.task: step.run_id for step in bench.store.list_steps(handle.id)}
    loser = bench.store.run(dispatch.claim_step, out["slow"], "node/1/request/claim", 30.0)
    assert loser is not None
    bench.run_step(out["quick"])
    bench.work()
    assert bench.effects == []
    bench.recover()  # whoever ran the loser is gone
    cancelled(handle)
    assert bench.effects == ["cleaned up"]


def test_the_flow_goes_on_by_its_own_means_if_it_catches_what_it_was_told(bench: Bench) -> None:
    def body(flow_id: str) -> str:
        bench.flows.handle(flow_id).cancel()
        strike()
        time.sleep(FOREVER)
        return ""

    @bench.flows.flow("deaf")
    def deaf(run: Run) -> str:
        with suppress(FlowCancelled, StepFailed):
            run.step(body, str(run.flow_id))
        return "finished all the same"

    handle = deaf.start()
    bench.work()
    cancelled(handle)


# ---- what a worker's parent asks, and does --------------------------------------------------------------------------


class Parent:
    """The parent of a worker whose one process is this one, or says so."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ended: list[int] = []
        self.queries = 0
        self._looks = False
        self.stops = Stops(bench.runtime, self.ended.append)
        run = bench.store.run

        def counted(operation: Any, *args: Any, **options: Any) -> Any:
            self.queries += self._looks
            return run(operation, *args, **options)

        monkeypatch.setattr(bench.store, "run", counted)

    def look(self) -> None:
        self._looks = True
        try:
            self.stops.look({ME: os.getpid()})
        finally:
            self._looks = False


@pytest.fixture
def parent(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Parent:
    return Parent(bench, monkeypatch)


@on_each_database
def test_a_parent_interrupts_what_runs_of_a_cancelled_flow_and_nothing_else(
    bench: Bench, parent: Parent, kind: str
) -> None:
    def body(flow_id: str) -> str:
        parent.look()
        assert parent.queries == 0  # it has just begun
        parent.look()
        assert parent.queries == 1
        parent.look()
        bench.flows.handle(flow_id).cancel()
        parent.look()
        bench.effects.append("not struck")
        return ""

    handle = flow_with(bench, kind, body).start()
    bench.drive(handle.id, ME)
    for kind_of, run_id in bench.claimable():
        if kind_of == "step":
            bench.run_step(run_id, worker=ME)
    bench.work()
    cancelled(handle)
    assert bench.effects == ["cleaned up"]
    parent.look()
    parent.look()
    assert parent.queries == 3


def test_a_parent_reaches_a_flow_past_its_deadline_but_not_a_paused_one(bench: Bench, parent: Parent) -> None:
    def body(flow_id: str) -> str:
        parent.look()
        bench.flows.manager.pause(bench.flows.handle(flow_id).id)
        time.sleep(0.4)
        parent.look()
        bench.effects.append("paused")
        bench.flows.manager.unpause(bench.flows.handle(flow_id).id)
        parent.look()
        bench.effects.append("not struck")
        return ""

    @bench.flows.flow("late", timeout=timedelta(seconds=0.3))
    def late(run: Run) -> None:
        run.step(body, str(run.flow_id))

    handle = late.start()
    bench.drive(handle.id, ME)
    with pytest.raises(FlowFailed, match="FlowTimedOut"):
        handle.result(0)
    assert bench.effects == ["paused"]


class Request:
    """What of a Celery request matters."""

    id, worker_pid, type = "request", os.getpid(), "flows.step"


@pytest.mark.parametrize("case", ["ended", "another request", "stopping", "another body", "moves"])
def test_a_process_is_ended_only_if_it_is_surely_in_the_midst_of_that_body(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    ended: list[int] = []
    stops = Stops(bench.runtime, ended.append)
    me = os.getpid()

    @contextmanager
    def standing_still(pid: int) -> Iterator[bool]:
        if case == "another body":
            bench.runtime.interrupts._begin(bench.runtime.interrupts.body(CLAIM))
        yield case != "moves"

    def body(flow_id: str) -> str:
        bench.flows.handle(flow_id).cancel()
        stops.look({ME: me})
        monkeypatch.setattr(stops_module, "HEED_SECONDS", 0.0)
        monkeypatch.setattr(stops_module, "standing_still", standing_still)
        monkeypatch.setattr(stops_module, "os", SimpleNamespace(getpid=lambda: 1))
        if case == "stopping":
            bench.runtime.stopping.set()
        stops.look({ME: me})
        monkeypatch.undo()
        return ""

    if case != "another request":
        monkeypatch.setattr(state, "active_requests", {Request()})
    handle = flow_with(bench, "inline", body).start()
    bench.drive(handle.id, ME)
    assert ended == ([me] if case == "ended" else [])
    bench.runtime.stopping._byte[0] = 0
    bench.call_driver(handle.id)
    bench.work()
    cancelled(handle)


@pytest.mark.parametrize("kind", ["inline", "celery"])
def test_what_an_ended_process_held_is_settled_at_once_and_is_no_crash(bench: Bench, kind: str) -> None:
    class Ended(BaseException):
        """The process."""

    def body(flow_id: str) -> str:
        bench.flows.handle(flow_id).cancel()
        raise Ended

    handle = flow_with(bench, kind, body).start()
    held = end_under(bench, handle, Ended)
    stops = Stops(bench.runtime, lambda pid: None)
    stops._ended[ME] = held
    bench.messages()
    stops.settle(["another"])
    assert bench.messages() == []
    stops.settle([ME])
    stops.settle([ME])
    assert [message.id for message in bench.messages()] == [str(handle.id)]
    assert all(row.crash_count == 0 and row.worker is None for row in bench.rows(handle.id))
    bench.work()
    cancelled(handle)
    assert bench.effects == ["cleaned up"]
    assert "reclaimed" not in bench.kinds(handle.id)


def end_under(bench: Bench, handle: FlowHandle[Any], ended: type[BaseException]) -> dispatch.Held:
    """Runs the step in a process that dies over it; gives the row that it held."""
    never_let_go = pytest.MonkeyPatch()
    for module in ("celery_flows.tasks.drive", "celery_flows.tasks.steps", "celery_flows.tasks.claimed"):
        never_let_go.setattr(f"{module}.let_go", lambda *_: None)
    with never_let_go.context(), suppress(ended):
        bench.drive(handle.id, ME)
        for kind, run_id in bench.claimable():
            if kind == "step":
                bench.run_step(run_id, worker=ME)
    never_let_go.undo()
    workers = [row.worker for row in bench.rows(handle.id) if row.worker is not None]
    [held] = bench.store.run(dispatch.list_to_stop, workers)
    assert held.worker.startswith(f"{ME}/")
    return held


def alarm_at(line: int) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that has the alarm strike before the ``line``-th line, from 1, that the module of interrupts
    comes to."""
    lines = 0

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != interrupts_module.__file__:
            return None
        if event == "line":
            lines += 1
            if lines == line:
                signal.raise_signal(signal.SIGALRM)
        return trace

    return trace


@pytest.mark.parametrize("line", range(1, 21))
def test_a_timeout_that_strikes_as_a_body_begins_or_ends_leaves_no_mark_of_it(
    interrupts: Interrupts, line: int
) -> None:
    """What runs next, cleanup or the engine itself, would be taken for that body, interrupted, and then ended."""
    before = sys.gettrace()
    with suppress(TimeIsUp):
        sys.settrace(alarm_at(line))
        try:
            with time_limit(FOREVER), interrupts.body(CLAIM):
                pass
        finally:
            sys.settrace(before)
    assert interrupts.running(os.getpid()) is None
    os.kill(os.getpid(), SIGNAL)  # strikes nothing


def test_a_timeout_as_long_as_its_body_leaves_no_mark_of_it(interrupts: Interrupts) -> None:
    stale = 0
    for number in range(2000):
        seconds = 0.0002 + (number % 50) * 1e-6
        until = time.perf_counter() + seconds
        with suppress(TimeIsUp), time_limit(seconds), interrupts.body(CLAIM):
            while time.perf_counter() < until:
                pass
        stale += interrupts.running(os.getpid()) is not None
    assert stale == 0
