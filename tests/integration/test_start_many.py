"""Starting many: all or none, each key once, without a message for each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from celery_flows import FlowHandle, InvalidData, KeyConflict, Run, StartPending
from celery_flows.store.tables import flow_dispatch, flow_events, flows
from celery_flows.tasks.ahead import LEAST
from celery_flows.tasks.start import Options
from celery_flows.tasks.start_many import CALLED_AT_ONCE, start_many, wanted
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench
from tests.support.faults import black_hole
from tests.support.sessions import Sessions
from tests.support.waiting import until

NOT_AGAIN = 600.0  # seconds: while a test runs, however slow, nothing is sent a second time


def doubling(bench: Bench) -> Any:
    @bench.flows.flow("doubles")
    def doubles(run: Run, n: int) -> int:
        return 2 * n

    return doubles


def count(bench: Bench, table: sa.Table = flows) -> int:
    [row] = bench.query(sa.select(sa.func.count()).select_from(table))
    return int(row[0])


def ids(handles: list[FlowHandle[Any]]) -> list[UUID]:
    return [handle.id for handle in handles]


def test_each_input_has_its_flow_in_order(bench: Bench) -> None:
    handles = doubling(bench).start_many(range(5), owner="tenant:acme", goal="to double")
    bench.work()
    assert [handle.result(0) for handle in handles] == [0, 2, 4, 6, 8]
    flow = handles[0].get()
    assert (flow.owner_session_key, flow.goal, flow.idempotency_key) == ("tenant:acme", "to double", None)
    assert bench.kinds(flow.id)[0] == "created"


def test_what_is_stored_is_what_single_starts_store(bench: Bench) -> None:
    flow = doubling(bench)
    single, [one] = flow.start(4, key="a", priority=7), flow.start_many([4], keys=["b"], priority=7)
    columns = [c for c in flow_dispatch.c if c.name not in ("run_id", "flow_id", "due_at")]
    rows = bench.query(sa.select(*columns))
    assert rows[0] == rows[1]
    events = [bench.store.list_events(handle.id)[0].payload_json for handle in (single, one)]
    assert events[0]["set"].pop("idempotency_key") == "a"
    assert events[1]["set"].pop("idempotency_key") == "b"
    assert events[0] == events[1]


def test_ten_thousand_are_stored_in_seconds_with_few_messages(bench: Bench) -> None:
    began = time.monotonic()
    handles = doubling(bench).start_many(range(10_000))
    assert time.monotonic() - began < 60  # some seconds on a machine that is not busy
    assert len(set(ids(handles))) == count(bench) == count(bench, flow_events) == count(bench, flow_dispatch) == 10_000
    assert [message.id for message in bench.messages()] == [str(each.id) for each in handles[:CALLED_AT_ONCE]]
    with bench.store.engine.begin() as connection:  # 10,000 histories are many to audit
        connection.execute(sa.delete(flows).where(flows.c.id.not_in(ids(handles[:40]))))
    bench.work()
    assert [handle.result(0) for handle in handles[:40]] == [2 * n for n in range(40)]


def test_sweeps_send_the_messages_of_the_others_at_once(make_bench: MakeBench) -> None:
    bench = make_bench(republish_seconds=NOT_AGAIN)
    handles = doubling(bench).start_many(range(CALLED_AT_ONCE + 5))
    bench.messages()
    assert bench.sweep().published == 5
    assert [message.id for message in bench.messages()] == [str(each.id) for each in handles[CALLED_AT_ONCE:]]
    assert bench.sweep().due == 0
    bench.work()


def test_sweeps_stay_so_far_ahead_of_what_is_taken_and_no_further(make_bench: MakeBench) -> None:
    bench = make_bench(sweep_limit=50, republish_seconds=NOT_AGAIN)
    handles = doubling(bench).start_many(range(CALLED_AT_ONCE + 150))
    assert [bench.sweep().published for _ in range(4)] == [50, LEAST, LEAST, LEAST]
    sent = [message.id for message in bench.messages()]
    for message in sent[CALLED_AT_ONCE : CALLED_AT_ONCE + 60]:
        bench.drive(UUID(message))
    assert bench.sweep().published == 50 - 20
    for message in [*sent[CALLED_AT_ONCE + 60 :], *(message.id for message in bench.messages())]:
        bench.drive(UUID(message))
    assert bench.sweep().published == 150 - 80 - 30
    bench.work()
    assert all(handle.status().is_terminal for handle in handles)


def test_what_is_begun_is_gone_on_with_before_thousands_that_are_not(make_bench: MakeBench) -> None:
    bench = make_bench(sweep_limit=20, republish_seconds=NOT_AGAIN)
    flow = doubling(bench)

    @bench.flows.flow("sleeps")
    def sleeps(run: Run) -> str:
        run.sleep(timedelta(hours=1))
        return "slept"

    sleeper = sleeps.start()
    bench.drive(sleeper.id)
    flow.start_many(range(100))
    assert [bench.sweep().published for _ in range(2)] == [20, LEAST]  # as far ahead as may be
    bench.messages()
    bench.call_driver(sleeper.id)  # its timer is due
    assert bench.sweep().published == 1 + LEAST
    assert str(sleeper.id) in [message.id for message in bench.messages()]
    sleeper.cancel()
    bench.work()


def test_nothing_to_start_is_nothing(bench: Bench) -> None:
    assert doubling(bench).start_many([]) == []
    assert (count(bench), bench.messages()) == (0, [])


# ---- keys -----------------------------------------------------------------------------------------------------------


def test_starting_again_gives_the_flows_that_are_there(bench: Bench) -> None:
    flow = doubling(bench)
    known = flow.start(1, key="b")
    first = flow.start_many([0, 1, 2], keys=["a", "b", None])
    assert first[1].id == known.id
    bench.messages()
    again = flow.start_many([0, 1, 3, 2], keys=["a", "b", "c", None])
    assert ids(again)[:2] == ids(first)[:2]
    assert [message.id for message in bench.messages()] == [str(again[2].id), str(again[3].id)]
    assert count(bench) == 5
    bench.work()
    assert [handle.result(0) for handle in again] == [0, 2, 6, 4]


def test_a_key_that_stands_twice_starts_one_flow(bench: Bench) -> None:
    first, again = doubling(bench).start_many([4, 4], keys=["a", "a"])
    assert first.id == again.id
    assert count(bench) == 1
    bench.work()


def test_a_key_that_stands_twice_with_different_inputs_is_refused(bench: Bench) -> None:
    with pytest.raises(InvalidData, match=r"keys\[2\]: is the same as keys\[0\], and its input is not"):
        doubling(bench).start_many([4, 5, 6], keys=["a", "b", "a"])
    assert count(bench) == 0


def test_a_conflict_of_one_starts_none(bench: Bench) -> None:
    flow = doubling(bench)
    known = flow.start(1, key="b")
    bench.messages()
    with pytest.raises(KeyConflict) as conflict:
        flow.start_many([0, 7, 2], keys=["a", "b", "c"])
    assert (conflict.value.key, conflict.value.flow_id) == ("b", known.id)
    assert (count(bench), bench.messages()) == (1, [])
    bench.work()


def test_whoever_is_overtaken_by_the_same_key_gets_that_flow(postgresql_url: str) -> None:
    """The other commits between this call's look and its own insert."""
    with closing(Bench(postgresql_url)) as bench, closing(Sessions(postgresql_url)) as sessions:
        flow = doubling(bench)
        with sessions.transaction() as caller:
            known = flow.start(1, key="b", session=caller)
            asked = wanted(flow, [0, 1], ["a", "b"], Options())
            waiting = sessions.blocked(lambda conn: start_many(bench.runtime, flow, asked, Options(), conn))
            caller.commit()
            assert waiting.result()[1].id == known.id
        assert count(bench) == 2
        bench.work()
        bench.audit()


def test_a_conflict_with_whoever_was_quicker_leaves_the_callers_transaction_usable(postgresql_url: str) -> None:
    with closing(Bench(postgresql_url)) as bench, closing(Sessions(postgresql_url)) as sessions:
        flow = doubling(bench)

        def start_two(conn: sa.Connection) -> None:
            flow.start(9, key="mine", session=conn)
            with pytest.raises(KeyConflict):
                flow.start_many([0, 7], keys=["a", "b"], session=conn)

        with sessions.transaction() as caller:
            flow.start(1, key="b", session=caller)
            waiting = sessions.blocked(start_two)
            caller.commit()
        waiting.result()
        keys = bench.query(sa.select(flows.c.idempotency_key).order_by(flows.c.idempotency_key))
        assert [row[0] for row in keys] == ["b", "mine"]
        bench.work()
        bench.audit()


def test_a_key_held_by_an_open_transaction_is_said_to_be_pending(postgresql_url: str) -> None:
    with closing(Bench(postgresql_url)) as bench:
        flow = doubling(bench)
        with bench.store.engine.connect() as caller:
            flow.start(4, key="b", session=caller)
            with pytest.raises(StartPending, match="one of these keys"):
                flow.start_many([3, 4], keys=["a", "b"])
        assert count(bench) == 0


def test_two_calls_with_the_same_keys_in_opposite_order_wait_for_each_other_in_turn(postgresql_url: str) -> None:
    with closing(Bench(postgresql_url)) as bench, closing(Sessions(postgresql_url)) as sessions:
        flow = doubling(bench)
        with sessions.transaction() as caller:
            first = flow.start_many([1, 2], keys=["a", "b"], session=caller)
            waiting = sessions.blocked(lambda conn: flow.start_many([2, 1], keys=["b", "a"], session=conn))
            caller.commit()
            assert ids(waiting.result()) == ids(first)[::-1]
        bench.work()
        bench.audit()


def test_a_repeated_call_after_a_lost_reply_gives_the_same_flows(bench: Bench) -> None:
    flow = doubling(bench)
    asked = wanted(flow, [1, 2], [None, "b"], Options())
    first = start_many(bench.runtime, flow, asked, Options(), None)
    if bench.store.engine.dialect.name == "postgresql":  # a file loses no reply
        assert ids(start_many(bench.runtime, flow, asked, Options(), None)) == ids(first)
    assert count(bench) == 2
    bench.work()


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "options", "said"),
    [
        ([1, "two", 3], {}, r"inputs\[1\]: .*integer"),
        ("abc", {}, "inputs: must be a list, not str"),
        ({"a": 1}, {}, "inputs: must be a list, not dict"),
        (7, {}, "inputs: must be a list, not int"),
        ([1, 2], {"keys": ["a"]}, "keys: are 1, for 2 inputs"),
        ([1, 2], {"keys": "ab"}, "keys: must be a list"),
        ([1, 2], {"keys": ["a", ""]}, r"keys\[1\]: must not be empty"),
        ([1, 2], {"keys": ["a", "b\0"]}, r"keys\[1\]: contains a NUL"),
        ([1], {"owner": ""}, "owner"),
        ([1], {"priority": 256}, "priority: must be a whole number from 0 to 255"),
        ([1], {"countdown": "soon"}, "countdown: must be seconds or a timedelta"),
    ],
)
def test_one_bad_thing_refuses_all_before_anything_is_written(
    bench: Bench, inputs: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidData, match=said):
        doubling(bench).start_many(inputs, **options)
    assert (count(bench), bench.messages()) == (0, [])


def test_inputs_that_are_no_plain_json_are_encoded_each(bench: Bench) -> None:
    @bench.flows.flow("echoes")
    def echoes(run: Run, value: Any) -> Any:
        return value

    values: list[Any] = [None, "Grüße 'quoted' \"twice\" \\ {,}", {"a": [1, None]}, 1.5, [], "null", "NULL"]
    handles = echoes.start_many(values, keys=[f"k {n}" for n in range(len(values))])
    assert [handle.get().input_json for handle in handles] == values
    bench.work()
    assert [handle.result(0) for handle in handles] == values


# ---- in a caller's transaction --------------------------------------------------------------------------------------


@contextmanager
def transaction(bench: Bench, kind: str) -> Iterator[Any]:
    opened: Any = bench.store.engine.connect() if kind == "connection" else Session(bench.store.engine)
    with opened as entered:
        yield entered


@pytest.mark.parametrize("kind", ["connection", "session"])
def test_the_callers_commit_decides(bench: Bench, kind: str) -> None:
    flow = doubling(bench)
    with transaction(bench, kind) as caller:
        flow.start_many([1, 2], keys=["a", "b"], session=caller)
        caller.rollback()
        handles = flow.start_many([3, 4], keys=["a", "b"], session=caller)
        assert (count(bench), bench.messages()) == (0, [])
        caller.commit()
    assert [message.id for message in bench.messages()] == [str(handle.id) for handle in handles]
    bench.work()
    assert [handle.result(0) for handle in handles] == [6, 8]


# ---- the broker -----------------------------------------------------------------------------------------------------


def test_a_broker_that_does_not_answer_holds_it_up_for_a_moment_only(make_bench: MakeBench) -> None:
    with black_hole() as port:
        bench = make_bench(broker=f"redis://127.0.0.1:{port}/0")
        flow = doubling(bench)
        began = time.monotonic()
        handles = flow.start_many(range(300))
        assert time.monotonic() - began < 15  # as for one flow
    working = make_bench()
    doubling(working)
    assert working.sweep().published == 300 - CALLED_AT_ONCE
    working.pass_time()
    until(lambda: working.sweep().due == 0, "all are called")
    working.work()
    assert working.flows.handle(handles[-1].id).result(0) == 598
