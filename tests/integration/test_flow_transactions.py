"""A transactional step: what it writes commits with its record, exactly once, whatever crashes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Session

from celery_flows import (
    FlowFailed,
    FlowNotFound,
    FlowStatus,
    InvalidData,
    Retry,
    RevisionMismatch,
    Run,
    StepFailed,
    StepTimedOut,
    StoreError,
)
from celery_flows.store.engines import make_engine
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench
from tests.support.faults import Died, MortalStore, Strikes

MOST_CALLS = 40

metadata = sa.MetaData()
accounts = sa.Table(
    "test_accounts", metadata, sa.Column("name", sa.Text, primary_key=True), sa.Column("cents", sa.Integer)
)


class Base(DeclarativeBase): ...


class AccountRow(Base):
    """A row of it."""

    __table__ = sa.Table("test_accounts", Base.metadata, *(column._copy() for column in accounts.columns))


class AccountOut(BaseModel):
    """What a flow gives of a row."""

    model_config = ConfigDict(from_attributes=True)
    name: str
    cents: int


@pytest.fixture(autouse=True)
def application_tables(engine_database: str) -> Iterator[None]:
    """The application's own table, in the store's database."""
    engine = make_engine(engine_database)
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(accounts).values([{"name": "a", "cents": 100}, {"name": "b", "cents": 0}]))
    yield
    metadata.drop_all(engine)
    engine.dispose()


def move(session: Session, cents: int) -> str:
    """Moves money from a to b."""
    for name, change in (("a", -cents), ("b", cents)):
        session.execute(sa.update(accounts).where(accounts.c.name == name).values(cents=accounts.c.cents + change))
    return f"moved {cents}"


def balances(bench: Bench) -> dict[str, int]:
    return {row.name: row.cents for row in bench.query(sa.select(accounts))}


def moving(bench: Bench) -> Any:
    @bench.flows.flow("moves money")
    def moves(run: Run, cents: int) -> str:
        return run.transaction(move, cents)

    return moves


def test_what_it_writes_commits_with_its_record(bench: Bench) -> None:
    handle = moving(bench).start(30)
    assert bench.finish(handle) == "moved 30"
    assert balances(bench) == {"a": 70, "b": 30}
    assert bench.kinds(handle.id) == ["created", "started", "step_succeeded", "finished"]


def test_a_failure_writes_nothing(bench: Bench) -> None:
    def fails(session: Session) -> None:
        move(session, 10)
        raise LookupError("no")

    @bench.flows.flow("fails")
    def flow(run: Run) -> str:
        with pytest.raises(StepFailed, match="LookupError: no"):
            run.transaction(fails)
        return "went on"

    assert bench.finish(flow.start()) == "went on"
    assert balances(bench) == {"a": 100, "b": 0}


def test_the_databases_refusal_is_the_steps_failure(bench: Bench) -> None:
    def twice(session: Session) -> None:
        session.execute(sa.insert(accounts).values(name="a", cents=1))

    @bench.flows.flow("twice")
    def flow(run: Run) -> str:
        try:
            run.transaction(twice)
        except StepFailed as failed:
            return failed.type
        return ""

    assert bench.finish(flow.start()) == IntegrityError.__name__


def test_it_is_tried_again_from_the_start(bench: Bench) -> None:
    def fails_once(session: Session) -> str:
        bench.effects.append("ran")
        told = move(session, 10)
        if len(bench.effects) == 1:
            raise ConnectionError
        return told

    @bench.flows.flow("again")
    def flow(run: Run) -> str:
        return run.options(retry=Retry(2, initial=timedelta(milliseconds=1))).transaction(fails_once)

    assert bench.finish(flow.start()) == "moved 10"
    assert balances(bench) == {"a": 90, "b": 10}


def test_its_own_commit_and_rollback_are_of_a_savepoint(bench: Bench) -> None:
    def rolls_back_in_between(session: Session) -> str:
        move(session, 10)
        session.rollback()
        told = move(session, 5)
        session.commit()
        return told

    @bench.flows.flow("savepoints")
    def flow(run: Run) -> str:
        return run.transaction(rolls_back_in_between)

    assert bench.finish(flow.start()) == "moved 5"
    assert balances(bench) == {"a": 95, "b": 5}


def test_a_commit_of_its_own_is_undone_by_its_failure(bench: Bench) -> None:
    def commits_and_fails(session: Session) -> None:
        move(session, 10)
        session.commit()
        raise LookupError

    @bench.flows.flow("fails")
    def flow(run: Run) -> None:
        run.transaction(commits_and_fails)

    with pytest.raises(FlowFailed):
        bench.finish(flow.start())
    assert balances(bench) == {"a": 100, "b": 0}


def test_a_change_of_the_flow_in_between_has_it_run_again(bench: Bench) -> None:
    """The flow's revision moves while the function runs: its writes are rolled back, and made anew."""

    def watched(session: Session, flow_id: Any) -> str:
        bench.effects.append("ran")
        if len(bench.effects) == 1 and bench.store.engine.dialect.name == "postgresql":
            bench.flows.manager.update_state(flow_id, {"seen": True})
        return move(session, 10)

    @bench.flows.flow("watched")
    def flow(run: Run) -> str:
        return run.transaction(watched, run.flow_id)

    handle = flow.start()
    assert bench.finish(handle) == "moved 10"
    assert balances(bench) == {"a": 90, "b": 10}
    if bench.store.engine.dialect.name == "postgresql":  # SQLite's one writer lets nobody in between
        assert bench.effects == ["ran", "ran"]
        assert handle.state() == {"seen": True}


def test_it_has_its_time(bench: Bench) -> None:
    def dawdles(session: Session) -> None:
        move(session, 10)
        time.sleep(60)

    @bench.flows.flow("dawdles")
    def flow(run: Run) -> str:
        with pytest.raises(StepTimedOut):
            run.options(timeout=timedelta(milliseconds=50)).transaction(dawdles)
        return "went on"

    assert bench.finish(flow.start()) == "went on"
    assert balances(bench) == {"a": 100, "b": 0}


def test_a_result_that_cannot_be_json_writes_nothing(bench: Bench) -> None:
    def bad(session: Session) -> Any:
        move(session, 10)
        return object()

    @bench.flows.flow("bad")
    def flow(run: Run) -> None:
        run.transaction(bad)

    with pytest.raises(FlowFailed, match=InvalidData.__name__):
        bench.finish(flow.start())
    assert balances(bench) == {"a": 100, "b": 0}


@pytest.mark.parametrize("strikes", list(Strikes))
def test_it_takes_effect_once_under_a_fault_at_every_call(make_bench: MakeBench, strikes: Strikes) -> None:
    survivor = make_bench()
    moves = moving(survivor)
    struck: list[str] = []
    for at in range(1, MOST_CALLS):
        store = MortalStore(make_engine(survivor.url))
        bench = make_bench(store=store)
        mortal_moves = moving(bench)
        store.strike(at, strikes)
        with suppress(Died):
            bench.finish(mortal_moves.start(1, key=str(at)))
        store.close()
        if store.struck is None:
            break
        struck.append(store.struck)
        handle = moves.start(1, key=str(at))
        survivor.recover()
        assert survivor.finish(handle) == "moved 1"
        assert balances(survivor) == {"a": 100 - at, "b": at}, f"{strikes} at {store.struck}"
    else:
        raise AssertionError(f"the flow makes more than {MOST_CALLS} calls: {struck}")
    assert {"create_flow", "claim_drive", "change_made", "change_flow"} <= set(struck)


def test_it_takes_effect_once_under_a_death_within(make_bench: MakeBench) -> None:
    def dies_once(session: Session, cents: int) -> str:
        told = move(session, cents)
        bench.effects.append("wrote")
        if len(bench.effects) == 1:
            raise Died
        return told

    bench = make_bench()

    @bench.flows.flow("dies")
    def flow(run: Run) -> str:
        return run.transaction(dies_once, 10)

    handle = flow.start()
    with pytest.raises(Died):
        bench.work()
    bench.recover()
    assert bench.finish(handle) == "moved 10"
    assert bench.effects == ["wrote", "wrote"]
    assert balances(bench) == {"a": 90, "b": 10}


@pytest.mark.parametrize("kind", ["mismatch", "not found", "store"])
def test_what_the_function_raises_of_ours_is_its_own_failure(bench: Bench, kind: str) -> None:
    """It is not taken for what became of the step's own write."""
    errors = {
        "mismatch": RevisionMismatch(uuid4(), 1, 2),
        "not found": FlowNotFound("another"),
        "store": StoreError("another database is away", is_passing=True),
    }

    def fails_once(session: Session) -> str:
        bench.effects.append("ran")
        told = move(session, 10)
        if len(bench.effects) == 1:
            raise errors[kind]
        return told

    @bench.flows.flow("again")
    def flow(run: Run) -> str:
        return run.options(retry=Retry(2, initial=timedelta(milliseconds=1))).transaction(fails_once)

    handle = flow.start()
    assert bench.finish(handle) == "moved 10"
    assert balances(bench) == {"a": 90, "b": 10}
    assert [step.attempt for step in bench.store.list_steps(handle.id)] == [2]


def test_a_conflict_each_time_has_an_end(make_bench: MakeBench) -> None:
    bench = make_bench(max_crashes=2)

    def conflicts(session: Session) -> None:
        bench.effects.append("ran")
        if bench.store.engine.dialect.name == "postgresql":
            session.execute(sa.text("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$"))
        raise sa.exc.OperationalError("x", {}, Exception("database is locked"))

    @bench.flows.flow("conflicts")
    def flow(run: Run) -> None:
        run.transaction(conflicts)

    handle = flow.start()
    for _ in range(4):
        bench.drive(handle.id)
        bench.sweep()
    with pytest.raises(FlowFailed, match="lost"):
        handle.result(0)
    assert balances(bench) == {"a": 100, "b": 0}
    assert len(bench.effects) > 2  # the store tried several times each


def test_a_result_is_read_while_its_rows_are_there(bench: Bench) -> None:
    def read(session: Session) -> AccountOut:
        return session.get_one(AccountRow, "a")  # type: ignore[return-value]

    @bench.flows.flow("reads")
    def flow(run: Run) -> AccountOut:
        return run.transaction(read)

    assert bench.finish(flow.start()) == AccountOut(name="a", cents=100)


def test_what_a_transaction_starts_and_emits_is_told_once_it_has_committed(bench: Bench) -> None:
    """Nobody else sees it before; and under SQLite whoever hands an event over would wait for this very transaction."""
    sent_before: list[str] = []

    @bench.flows.flow("waiting")
    def waiting(run: Run) -> Any:
        return run.wait_for("told", "a")

    def tell(session: Session) -> None:
        bench.flows.emit("told", "a", "yes", session=session)
        waiting.start(key="another", session=session)
        session.commit()
        sent_before.extend(message.id for message in bench.messages())

    @bench.flows.flow("telling")
    def telling(run: Run) -> None:
        run.transaction(tell)

    waiter, teller = waiting.start(), telling.start()
    bench.drive(waiter.id)
    bench.messages()
    bench.drive(teller.id)
    another = waiting.start(key="another")
    assert sent_before == []
    assert {message.id for message in bench.messages()} >= {str(another.id)}
    assert bench.finish(waiter) == "yes"


def test_what_a_transaction_rolls_back_is_never_told(bench: Bench) -> None:
    @bench.flows.flow("started")
    def started(run: Run) -> None: ...

    def begin(session: Session) -> None:
        started.start(session=session)
        session.rollback()

    def fail(session: Session) -> None:
        started.start(session=session)
        raise LookupError

    @bench.flows.flow("starting")
    def starting(run: Run) -> None:
        run.transaction(begin)
        with suppress(StepFailed):
            run.transaction(fail)

    handle = starting.start()
    bench.messages()
    bench.drive(handle.id)
    assert (handle.status(), bench.messages()) == (FlowStatus.FINISHED, [])
    assert bench.flows.search(definition="started") == []


FAILING = {
    "no such table": "INSERT INTO nowhere (name) VALUES (:name)",
    "the row is there": "INSERT INTO test_accounts (name) VALUES (:name), (:name)",
    "no number": "INSERT INTO test_accounts (name, cents) VALUES (:name, CAST(:name AS INTEGER))",
}


@pytest.mark.parametrize("how", FAILING)
def test_a_failed_statement_is_kept_without_its_parameters(bench: Bench, how: str) -> None:
    """Nor with what PostgreSQL repeats of them: they are the application's data, and errors are shown and logged."""

    def write(session: Session, name: str) -> None:
        session.execute(sa.text(FAILING[how]), {"name": name})
        assert session.get_bind().dialect.name != "postgresql"  # SQLite casts whatever it is given
        raise ValueError

    @bench.flows.flow("fails")
    def fails(run: Run, name: str) -> None:
        run.transaction(write, name)

    handle = fails.start("4111-SECRET")
    bench.work()
    step, flow = bench.store.list_steps(handle.id)[0], handle.get()
    assert step.error_json
    assert step.error_json["type"] in {
        "ValueError",
        "ProgrammingError",
        "OperationalError",
        "IntegrityError",
        "DataError",
    }
    assert "SECRET" not in f"{step.error_json} {flow.error_json}"
    assert "INSERT" not in f"{step.error_json}"
