"""A process dies, or loses the answer of the database, at each call of the store in turn: nothing is lost, and no
recorded step runs again."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from celery.exceptions import WorkerShutdown, WorkerTerminate

from celery_flows import FlowFailed, FlowHandle, FlowStatus, FlowStepStatus, Run, StepFailed, StepLost
from celery_flows.store import StoreError, dispatch
from celery_flows.store.engines import make_engine
from celery_flows.store.tables import flow_inbox, flows
from celery_flows.tasks.runtime import claim_token
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench
from tests.support.faults import Died, MortalStore, Strikes
from tests.support.waiting import until

MOMENT = timedelta(milliseconds=25)  # long enough not to have passed when the flow is about to wait for it
MOST_CALLS = 100  # a scenario that makes more calls than this is not covered to its end


class Scenario:
    """One flow with everything in it, and what of it was seen."""

    def __init__(self, effects: list[str]) -> None:
        self.effects = effects

    def define(self, bench: Bench) -> Any:
        def note(name: str) -> str:
            self.effects.append(name)
            return name

        @bench.task("noted")
        def noted(name: str) -> str:
            self.effects.append(name)
            if name == "bad":
                raise ValueError(name)
            return name

        @bench.flows.flow("child of all in one")
        def child(run: Run, name: str) -> str:
            return run.step(note, "of a child")

        @bench.flows.flow("all in one")
        def all_in_one(run: Run, name: str) -> list[Any]:
            seen: list[Any] = [run.step(note, "inline")]
            run.sleep(MOMENT)
            seen += run.gather([noted.s("one"), noted.s("two")])
            try:
                run.step(noted, "bad")
            except StepFailed as failed:
                seen.append(failed.message)
            seen += [run.wait_for("early", name), run.wait_for("late", name)]
            seen.append(run.flow(child, name))
            return [*seen, run.step(note, "last")]

        return all_in_one


EXPECTED = ["inline", "one", "two", "bad", "early", "late", "of a child", "last"]
STEPS = ["inline", "one", "two", "bad", "of a child", "last"]


def play(bench: Bench, flow: Any, name: str) -> FlowHandle[Any]:
    """Starts the flow, emits one event before and one while it waits, and works to the end; may die anywhere."""
    handle: FlowHandle[Any] = flow.start(name, key=name)
    bench.flows.emit("early", name, "early")

    def waits() -> bool:
        bench.work()
        return waits_for_event(bench, handle.id)

    until(waits, "the flow waits for its event")
    bench.flows.emit("late", name, "late")
    bench.finish(handle)
    return handle


def waits_for_event(bench: Bench, flow_id: UUID) -> bool:
    """Looked up past the store, whose calls are counted."""
    waiting = flows.select().where(flows.c.id == flow_id, flows.c.status == "waiting", flows.c.wait_key.isnot(None))
    return bool(bench.query(waiting))


def mortal(make_bench: MakeBench, url: str, **conf: Any) -> tuple[Bench, MortalStore]:
    """A process that is going to die, and the store to say when."""
    store = MortalStore(make_engine(url))
    return make_bench(store=store, **conf), store


# Dying after a call is dying before the next one, but for what runs in between; that has a test of its own below.
@pytest.mark.parametrize("strikes", [Strikes.BEFORE, Strikes.REPLY_LOST], ids=["death", "lost reply"])
def test_a_fault_at_any_call_of_the_store_loses_and_repeats_nothing(
    make_bench: MakeBench, engine_database: str, strikes: Strikes
) -> None:
    struck = []
    survivor_effects: list[str] = []
    survivor = make_bench()
    survivor_flow = Scenario(survivor_effects).define(survivor)
    for at in range(1, MOST_CALLS):
        effects: list[str] = []
        bench, store = mortal(make_bench, engine_database)
        flow = Scenario(effects).define(bench)
        name = f"{strikes.name}-{at}"
        store.strike(at, strikes)
        survivor_effects.clear()
        try:
            play(bench, flow, name)
        except Died:
            # The caller tries again what it does not know to have happened; a new worker finds the rest.
            survivor_flow.start(name, key=name)
            for topic in {"early", "late"} - emitted(survivor, name):
                survivor.flows.emit(topic, name, topic)
        store.close()
        if store.struck is None:
            break
        struck.append(store.struck)
        handle = survivor_flow.start(name, key=name)
        settle(survivor, handle)
        assert handle.result(0) == EXPECTED
        check_effects(effects + survivor_effects, recorded_again=strikes is Strikes.REPLY_LOST, at=store.struck)
    else:
        raise AssertionError(f"the scenario makes more than {MOST_CALLS} calls: {struck}")
    assert {"create_flow", "claim_drive", "claim_step", "change_flow", "complete_step", "read_history"} <= set(struck)
    assert {"emit", "hand_over_next", "park", "change_with_children", "settle_child"} <= set(struck)


def settle(bench: Bench, handle: FlowHandle[Any]) -> None:
    """Leases end and sweeps look until the flow has ended; each round stands for their pauses."""
    for _ in range(50):
        if handle.status().is_terminal:
            return
        bench.pass_time()
        bench.sweep()
        bench.work()
    raise AssertionError(f"the flow does not end: {bench.kinds(handle.id)}")


def emitted(bench: Bench, name: str) -> set[str]:
    return {row.topic for row in bench.query(flow_inbox.select().where(flow_inbox.c.correlation_id == name))}


def check_effects(effects: list[str], *, recorded_again: bool, at: str) -> None:
    """Each step ran; at most the one in the process's hands ran twice, and only if its record was not written."""
    doubled = [name for name in STEPS if effects.count(name) > 1]
    assert all(effects.count(name) >= 1 for name in STEPS), (at, effects)
    assert len(doubled) <= (0 if recorded_again else 1), (at, effects)
    assert all(effects.count(name) <= 2 for name in STEPS), (at, effects)


def test_a_step_that_was_recorded_does_not_run_again_after_a_crash_one_call_later(
    make_bench: MakeBench, engine_database: str
) -> None:
    """The same, told as a story: the process dies right after the commit of the step's record."""
    effects: list[str] = []
    (doomed, store), survivor = mortal(make_bench, engine_database), make_bench()

    def define(bench: Bench) -> Any:
        def pay(cents: int) -> int:
            effects.append("paid")
            return cents

        def deliver() -> str:
            effects.append("delivered")
            return "done"

        @bench.flows.flow("story")
        def story(run: Run) -> str:
            run.step(pay, 5)
            return run.step(deliver)

        return story

    flow, _ = define(doomed), define(survivor)
    handle = flow.start()
    store.strike(2, Strikes.AFTER)  # the claim, the record
    with pytest.raises(Died):
        doomed.drive(handle.id)
    assert (effects, store.struck) == (["paid"], "change_flow")
    survivor.recover()
    assert survivor.flows.handle(handle.id).result(0) == "done"
    assert effects == ["paid", "delivered"]
    assert "reclaimed" in survivor.kinds(handle.id)


def test_a_flow_is_not_taken_over_while_its_lease_runs(make_bench: MakeBench, engine_database: str) -> None:
    (doomed, store), survivor = mortal(make_bench, engine_database), make_bench()
    for bench in (doomed, survivor):
        flow = Scenario([]).define(bench)
    handle = flow.start("leased")
    store.strike(2, Strikes.BEFORE)
    with pytest.raises(Died):
        doomed.drive(handle.id)
    assert survivor.claimable() == []
    survivor.drive(handle.id)  # a doubled message
    assert survivor.sweep().due == 0
    assert survivor.rows(handle.id)[0].worker.startswith("bench/")
    assert survivor.end_leases() == 1
    assert survivor.sweep().published == 1


# ---- work that kills its workers ------------------------------------------------------------------------------------


def test_a_step_that_kills_its_workers_is_given_up_and_the_flow_may_catch_it(
    make_bench: MakeBench, engine_database: str
) -> None:
    effects: list[str] = []
    survivor = make_bench(max_crashes=3)
    define_poison(survivor, effects)
    handle = survivor.runtime.registry.require("poisoned").start()
    survivor.drive(handle.id)
    for crash in range(3):
        die_in_step(make_bench, engine_database, handle, effects)
        assert len(effects) == crash + 1
        survivor.end_leases()
        survivor.sweep()
    assert len(effects) == 3
    assert survivor.finish(handle) == "caught StepLost: its workers died 3 times"
    [step] = survivor.store.list_steps(handle.id)
    assert step.status is FlowStepStatus.FAILED


def define_poison(bench: Bench, effects: list[str]) -> None:
    @bench.task("poison")
    def poison() -> None:
        effects.append("poison")
        raise Died

    @bench.flows.flow("poisoned")
    def poisoned(run: Run) -> str:
        try:
            run.step(poison)
        except StepLost as lost:
            return f"caught {lost.type}: {lost.message}"
        return "survived"


def die_in_step(make_bench: MakeBench, url: str, handle: FlowHandle[Any], effects: list[str]) -> None:
    doomed, store = mortal(make_bench, url, max_crashes=3)
    define_poison(doomed, effects)
    [run_id] = [step.run_id for step in doomed.store.list_steps(handle.id)]
    store.strike(2, Strikes.BEFORE)  # the claim, then nothing: not even handing the row back
    with pytest.raises(Died):
        doomed.run_step(run_id)


def test_a_flow_that_kills_its_workers_fails_as_lost_with_its_history(
    make_bench: MakeBench, engine_database: str
) -> None:
    def define(bench: Bench) -> Any:
        def die() -> None:
            raise Died

        @bench.flows.flow("deadly")
        def deadly(run: Run) -> None:
            run.step(str, 1)
            run.step(die)

        return deadly

    survivor = make_bench(max_crashes=3)
    handle = define(survivor).start()
    for crash in range(3):
        doomed, store = mortal(make_bench, engine_database, max_crashes=3)
        define(doomed)
        store.strike(3, Strikes.BEFORE)  # the first time claim, record; later claim, history: then nothing
        with pytest.raises(Died):
            doomed.drive(handle.id)
        assert handle.status() is FlowStatus.RUNNING
        survivor.end_leases()
        assert survivor.sweep().lost == (crash == 2)
    with pytest.raises(FlowFailed) as failed:
        handle.result(0)
    assert (failed.value.reason, failed.value.type) == ("lost", "DriverLost")
    assert [step.task for step in survivor.store.list_steps(handle.id)] == ["str"]


def test_progress_forgives_crashes(make_bench: MakeBench, engine_database: str) -> None:
    """Only crashes in a row count: a flow that gets a record in between is not poison."""

    def define(bench: Bench, effects: list[str]) -> Any:
        def note(number: int) -> int:
            effects.append(str(number))
            return number

        @bench.flows.flow("slow but sure")
        def slow(run: Run) -> list[int]:
            return [run.step(note, number) for number in range(6)]

        return slow

    effects: list[str] = []
    survivor = make_bench(max_crashes=2)
    handle = define(survivor, effects).start()
    for crash in range(5):
        doomed, store = mortal(make_bench, engine_database, max_crashes=2)
        define(doomed, effects)
        store.strike(2 if crash == 0 else 3, Strikes.AFTER)  # claim, history but at first, one record
        with pytest.raises(Died):
            doomed.drive(handle.id)
        assert store.struck == "change_flow"
        survivor.end_leases()
        survivor.sweep()
    assert survivor.finish(handle) == list(range(6))
    assert effects == [str(number) for number in range(6)]


# How a call that ends more than itself leaves its row: a worker that was told to stop is not the work's fault.
endings = pytest.mark.parametrize(
    ("ending", "crashes"), [(WorkerShutdown, 0), (WorkerTerminate, 0), (KeyboardInterrupt, 1), (SystemExit, 1)]
)


@endings
def test_what_ends_a_flows_process_is_a_crash_unless_the_worker_was_told_to_stop(
    bench: Bench, ending: type[BaseException], crashes: int
) -> None:
    ends = [ending]

    def interrupted() -> int:
        if ends:
            raise ends.pop()
        return 1

    @bench.flows.flow("stops")
    def stops(run: Run) -> int:
        return run.step(interrupted)

    handle = stops.start()
    with pytest.raises(ending):
        bench.drive(handle.id)
    assert bench.sweep().published == 1
    [row] = bench.rows(handle.id)
    assert (row.worker, row.crash_count) == (None, crashes)
    assert bench.finish(handle) == 1


@endings
def test_what_ends_a_steps_process_is_a_crash_unless_the_worker_was_told_to_stop(
    bench: Bench, ending: type[BaseException], crashes: int
) -> None:
    ends = [ending]

    @bench.task("interrupted")
    def interrupted() -> int:
        if ends:
            raise ends.pop()
        return 1

    @bench.flows.flow("stops")
    def stops(run: Run) -> int:
        return run.step(interrupted)

    handle = stops.start()
    bench.drive(handle.id)
    [step] = bench.store.list_steps(handle.id)
    with pytest.raises(ending):
        bench.run_step(step.run_id)
    assert bench.sweep().published == 1
    [_, row] = bench.rows(handle.id)
    assert (row.worker, row.crash_count) == (None, crashes)
    assert bench.finish(handle) == 1


REFUSE = {
    "sqlite": [
        """CREATE TRIGGER refuse BEFORE INSERT ON flow_events WHEN NEW.kind = 'step_succeeded'
           BEGIN SELECT RAISE(ABORT, 'no more space'); END"""
    ],
    "postgresql": [
        """CREATE FUNCTION refuse() RETURNS trigger AS $$ BEGIN
           IF NEW.kind = 'step_succeeded' THEN RAISE EXCEPTION 'no more space'; END IF; RETURN NEW; END $$
           LANGUAGE plpgsql""",
        "CREATE TRIGGER refuse BEFORE INSERT ON flow_events FOR EACH ROW EXECUTE FUNCTION refuse()",
    ],
}
ALLOW = {"sqlite": ["DROP TRIGGER refuse"], "postgresql": ["DROP FUNCTION refuse CASCADE"]}


@pytest.mark.parametrize("way", ["inline", "step"])
def test_an_outcome_that_the_database_refuses_is_not_tried_for_ever(make_bench: MakeBench, way: str) -> None:
    bench, runs = make_bench(max_crashes=3), []

    def work() -> int:
        runs.append(way)
        return len(runs)

    task = bench.task("work")(work)

    @bench.flows.flow("refused")
    def refused(run: Run) -> int:
        return run.step(task if way == "step" else work)

    handle = refused.start()
    kind = bench.store.engine.dialect.name
    with bench.store.engine.begin() as connection:
        for statement in REFUSE[kind]:
            connection.exec_driver_sql(statement)
    try:
        for _ in range(10):
            for kind_of_row, run_id in bench.claimable():
                with suppress(StoreError):
                    bench.drive(UUID(run_id)) if kind_of_row == "drive" else bench.run_step(run_id)
            bench.sweep()
    finally:
        with bench.store.engine.begin() as connection:
            for statement in ALLOW[kind]:
                connection.exec_driver_sql(statement)
    bench.work()
    assert len(runs) == 3
    assert (handle.status(), (handle.get().error_json or {})["type"]) == (
        FlowStatus.FAILED, "DriverLost" if way == "inline" else "StepLost",
    )  # fmt: skip


def test_work_that_its_parent_released_too_often_is_given_up(bench: Bench) -> None:
    """The parent of a dead process ends its lease before any sweep finds it; that counts, too."""

    @bench.task("deadly")
    def deadly() -> int:
        return 1

    @bench.flows.flow("deadly")
    def flow(run: Run) -> str:
        try:
            run.step(deadly)
        except StepLost as lost:
            return f"caught {lost.type}"
        return "survived"

    handle = flow.start()
    bench.drive(handle.id)
    [step] = bench.store.list_steps(handle.id)
    limit = bench.flows.settings.max_crashes
    for crash in range(1, limit + 1):
        worker = bench.token()
        claim = bench.store.run(dispatch.claim_step, step.run_id, claim_token(worker), 30.0)
        assert claim is not None
        assert bench.store.run(dispatch.release, [worker]) == 1
        assert bench.sweep().lost == (crash == limit)
    assert bench.finish(handle) == "caught StepLost"
