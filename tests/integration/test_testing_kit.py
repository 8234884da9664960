"""The test kit: flows in process over each database, on a clock that only the test moves; its faults must strike."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery
from sqlalchemy.orm import Session

from celery_flows import (
    Approval,
    FlowCancelled,
    FlowFailed,
    FlowManager,
    Flows,
    FlowStatus,
    InvalidData,
    ResultTimedOut,
    Retry,
    Run,
    SqlFlowStore,
    StepFailed,
    UnknownFlow,
    WaitTimedOut,
)
from celery_flows.store import audit, clock
from celery_flows.store import operations as op
from celery_flows.store.engines import make_engine
from celery_flows.tasks.testing.databases import wipe
from celery_flows.testing import (
    FlowApp,
    FlowClock,
    FlowCrash,
    FlowMessages,
    NeverStruck,
    NotInline,
    Spins,
    Stuck,
    assert_history,
    history,
    most_at_once,
    open_flow_app,
    run_inline,
)

NOBODY = "redis://127.0.0.1:1/0"  # a broker that is not there
_numbers = itertools.count(1)


class Shop:
    """An application of a user's, made anew for each test: Celery keeps its apps for good."""

    def __init__(self) -> None:
        self.app = Celery(f"shop-{next(_numbers)}", broker=NOBODY, set_as_current=False)
        self.app.conf.task_default_queue = self.app.main
        self.flows = Flows(self.app)
        self.seen: list[Any] = []

        @self.app.task(name="charge", shared=False)
        def charge(order: str, cents: int) -> str:
            return f"paid {cents} for {order}"

        @self.app.task(name="mail", shared=False)
        def mail(order: str) -> None:
            raise AssertionError("a message of the application's own, which nobody is to take")

        def reserve(order: str) -> int:
            if self.app.connection_for_write().transport_cls == "memory":
                mail.delay(order)
            return 3

        def release(order: str) -> None:
            self.seen.append(f"released {order}")

        @self.flows.flow("ship")
        def ship(run: Run, order: str) -> str:
            run.sleep(timedelta(days=1))
            return f"shipped {order}"

        @self.flows.flow("fulfil")
        def fulfil(run: Run, order: str) -> list[Any]:
            boxes = run.step(reserve, order)
            paid = run.step(charge, order, 100 * boxes)
            run.sleep(timedelta(days=90))
            both = run.gather([charge.s(order, 1), ship.s(order)])
            try:
                approval = run.wait_for("approval", order, timeout=timedelta(days=3))
            except WaitTimedOut:
                approval = None
            except FlowCancelled:
                run.step(release, order)
                raise
            return [paid, *both, approval]

        self.charge, self.reserve, self.ship, self.fulfil = charge, reserve, ship, fulfil


PAID = ["paid 300 for o1", "paid 1 for o1", "shipped o1"]


@pytest.fixture
def shop() -> Shop:
    """The application under test."""
    return Shop()


@pytest.fixture
def flow_celery_app(shop: Shop) -> Celery:
    """What the kit asks for."""
    return shop.app


@pytest.fixture
def flow_store_url(database_url: str) -> Iterator[str]:
    """The kit over each database. Whatever a test did there, the events of every flow give its rows back."""
    yield database_url
    store = SqlFlowStore(make_engine(database_url))
    assert [str(finding) for finding in audit.verify(store)] == []
    store.close()


# ---- driving --------------------------------------------------------------------------------------------------------


def test_a_flow_of_months_ends_in_no_time(shop: Shop, flow_app: FlowApp, flow_clock: FlowClock) -> None:
    began = flow_clock.now()
    handle = shop.fulfil.start("o1")
    shop.flows.emit("approval", "o1", {"by": "Ada"})
    assert handle.result() == [*PAID, {"by": "Ada"}]
    assert flow_app.ran == ["reserve", "charge", "charge"]
    assert timedelta(days=91) < flow_clock.now() - began < timedelta(days=91, seconds=1)


def test_run_does_what_is_to_be_done_now_and_no_more(shop: Shop, flow_app: FlowApp, flow_clock: FlowClock) -> None:
    handle = shop.fulfil.start("o1")
    assert flow_app.ran == []
    flow_app.run()
    assert flow_app.ran == ["reserve", "charge"]
    flow_app.run()
    assert handle.status() is FlowStatus.WAITING
    flow_clock.advance(days=90)
    assert flow_app.ran == ["reserve", "charge", "charge"]
    flow_clock.advance(days=1)
    shop.flows.emit("approval", "o1", {})
    flow_app.run()
    assert handle.result(0) == [*PAID, {}]


def test_a_wait_times_out_on_the_clock_of_the_test(shop: Shop, flow_app: FlowApp, flow_clock: FlowClock) -> None:
    handle = shop.fulfil.start("o1")
    flow_clock.advance(timedelta(days=93, hours=23))
    assert handle.status() is FlowStatus.WAITING
    flow_clock.advance(hours=1, seconds=1)
    assert handle.result(0) == [*PAID, None]


def test_the_patience_of_who_waits_for_a_result_is_on_the_clock_of_the_test(
    shop: Shop, flow_app: FlowApp, flow_clock: FlowClock
) -> None:
    began = flow_clock.now()
    handle = shop.fulfil.start("o1")
    with pytest.raises(ResultTimedOut):
        handle.result(timeout=60)
    assert timedelta(seconds=60) <= flow_clock.now() - began < timedelta(seconds=61)
    assert handle.result(timeout=100 * 86_400) == [*PAID, None]


def test_a_result_is_that_of_the_flow_that_goes_on(shop: Shop, flow_app: FlowApp, flow_clock: FlowClock) -> None:
    @shop.flows.flow("yearly")
    def yearly(run: Run, years: int) -> str:
        run.sleep(timedelta(days=365))
        if years > 1:
            run.restart_as(years - 1)
        return "over"

    began = flow_clock.now()
    assert yearly.start(3).result() == "over"
    assert (flow_clock.now() - began).days == 3 * 365


def test_a_cancelled_flow_cleans_up(shop: Shop, flow_app: FlowApp, flow_clock: FlowClock) -> None:
    handle = shop.fulfil.start("o1")
    flow_clock.advance(days=91, seconds=1)
    handle.cancel()
    with pytest.raises(FlowCancelled):
        handle.result()
    assert shop.seen == ["released o1"]


def test_a_failed_flow_says_so(shop: Shop, flow_app: FlowApp) -> None:
    @shop.flows.flow("breaks")
    def breaks(run: Run) -> None:
        raise ValueError("of itself")

    with pytest.raises(FlowFailed, match="ValueError: of itself"):
        breaks.start().result()


def test_flows_that_no_definition_drives_go_by_the_clock_too(
    shop: Shop, flow_app: FlowApp, flow_clock: FlowClock
) -> None:
    manager = shop.flows.manager
    flow = manager.create_managed(controller_id="by hand", owner_session_key="o")
    manager.start_running(flow.id)
    manager.set_waiting(flow.id, {"kind": "timer", "at": flow_clock.now() + timedelta(days=7)})
    flow_clock.advance(days=6)
    assert manager.get(flow.id).status is FlowStatus.WAITING
    flow_clock.advance(days=1)
    assert manager.get(flow.id).status is FlowStatus.RUNNING


# ---- time -----------------------------------------------------------------------------------------------------------


def test_what_falls_due_on_the_way_is_done_at_its_own_time(
    shop: Shop, flow_app: FlowApp, flow_clock: FlowClock
) -> None:
    times: list[datetime] = []

    def note() -> None:
        times.append(flow_clock.now())

    @shop.flows.flow("monthly")
    def monthly(run: Run) -> None:
        for _ in range(3):
            run.sleep(timedelta(days=30))
            run.step(note)

    began = flow_clock.now()
    handle = monthly.start()
    flow_clock.advance(days=365)
    assert handle.status() is FlowStatus.FINISHED
    assert [(at - began).days for at in times] == [30, 60, 90]
    assert flow_clock.now() - began >= timedelta(days=365)


def test_all_times_in_the_store_are_the_clocks_and_no_two_are_the_same(
    shop: Shop, flow_app: FlowApp, flow_clock: FlowClock
) -> None:
    flow_clock.advance(days=1000)
    before = flow_clock.now()
    handle = shop.fulfil.start("o1")
    flow_app.run()
    flow = handle.get()
    assert before < flow.created_at < flow.updated_at < flow_clock.now() < before + timedelta(seconds=1)
    events = flow_app.store.list_events(handle.id, None)[::-1]
    assert [event.at for event in events] == sorted({event.at for event in events})


@pytest.fixture
def own_engine(database_url: str) -> Iterator[sa.Engine]:
    """The application's own, which has been used before the kit comes, and is after it has gone."""
    engine = make_engine(database_url)
    store = SqlFlowStore(engine)
    yield engine
    assert abs(store.run(op.now) - datetime.now(UTC)) < timedelta(minutes=1)
    store.close()


def test_the_applications_own_transactions_go_by_the_clock(
    shop: Shop, own_engine: sa.Engine, flow_app: FlowApp, flow_clock: FlowClock
) -> None:
    flow_clock.advance(days=50)
    before = flow_clock.now()
    with Session(own_engine) as session, session.begin():
        handle = shop.ship.start("o1", session=session)
    assert handle.get().created_at > before
    assert handle.result() == "shipped o1"


def test_a_time_without_workers_passes_without_work(shop: Shop, flow_app: FlowApp, flow_clock: FlowClock) -> None:
    handle = shop.fulfil.start("o1")
    flow_app.run()
    flow_clock.move_to(flow_clock.now() + timedelta(days=200))
    assert handle.status() is FlowStatus.WAITING
    flow_clock.move_to(flow_clock.now() - timedelta(days=100))
    flow_app.run()
    assert flow_app.ran == ["reserve", "charge", "charge"]
    assert handle.get().updated_at - handle.get().created_at > timedelta(days=200)


def test_a_retrys_pause_is_on_the_clock(shop: Shop, flow_app: FlowApp, flow_clock: FlowClock) -> None:
    @shop.app.task(name="flaky", bind=True, max_retries=5, shared=False)
    def flaky(self: Any) -> int:
        if self.request.retries < 2:
            raise self.retry(countdown=3600)
        return int(self.request.retries)

    @shop.flows.flow("tries")
    def tries(run: Run) -> Any:
        return run.step(flaky)

    handle = tries.start()
    flow_clock.advance(minutes=59)
    assert flow_app.ran == ["flaky"]
    flow_clock.advance(minutes=1)
    assert flow_app.ran == ["flaky", "flaky"]
    assert handle.result() == 2


def test_pauses_of_retries_and_deadlines_are_on_the_clock(shop: Shop, flow_app: FlowApp, flow_clock: FlowClock) -> None:
    def broken() -> None:
        raise ValueError("for ever")

    @shop.flows.flow("retries", timeout=timedelta(minutes=20))
    def retries(run: Run) -> None:
        run.options(retry=Retry(max_attempts=1000)).step(broken)

    began = flow_clock.now()
    handle = retries.start()
    flow_clock.advance(minutes=19)
    assert handle.status() is FlowStatus.RUNNING
    assert len(flow_app.ran) > 2
    with pytest.raises(FlowFailed, match="FlowTimedOut"):
        handle.result()
    assert timedelta(minutes=20) <= flow_clock.now() - began < timedelta(minutes=21)


def test_a_step_may_take_longer_than_its_lease(shop: Shop, flow_app: FlowApp, flow_clock: FlowClock) -> None:
    def slow() -> None:
        flow_clock.advance(hours=1)

    @shop.flows.flow("slow")
    def slow_flow(run: Run) -> None:
        run.step(slow)
        run.step(slow)

    handle = slow_flow.start()
    flow_app.run()
    assert_history(handle, ["created", "started", "step_succeeded slow", "step_succeeded slow", "finished"])
    flow = handle.get()
    assert flow.updated_at - flow.created_at > timedelta(hours=2)


def test_time_does_not_go_back(flow_clock: FlowClock) -> None:
    ways: list[Callable[[], None]] = [
        lambda: flow_clock.advance(days=-1),
        lambda: flow_clock.advance(timedelta(days=-1)),
        lambda: flow_clock.advance_to(datetime(2020, 1, 1, tzinfo=UTC)),
    ]
    for go_back in ways:
        with pytest.raises(InvalidData, match=r"does not go back, and it is \d{4}-.* reckon from flow_clock.now()"):
            go_back()


def test_a_time_that_is_none_is_told_what_is_meant(flow_clock: FlowClock) -> None:
    clock: Any = flow_clock
    wrong: list[tuple[Callable[[], None], str]] = [
        (lambda: clock.advance(60), "takes a timedelta, or a number with its unit, as in seconds=60"),
        (lambda: clock.advance(datetime(2100, 1, 1, tzinfo=UTC)), r"advance_to\(…\) takes a time"),
        (lambda: clock.advance(day=1), "takes the units of timedelta, as in days=90"),
        (lambda: clock.advance_to(timedelta(days=1)), r"takes a datetime, .* advance\(…\) takes how long"),
        (lambda: clock.advance_to(datetime(2100, 1, 1)), "time zone"),  # noqa: DTZ001
        (lambda: clock.move_to(datetime(2100, 1, 1)), "time zone"),  # noqa: DTZ001
    ]
    for said, told in wrong:
        with pytest.raises(InvalidData, match=told):
            said()


# ---- crashes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("when", "times"), [("before", 1), ("during", 2), ("after", 1)])
@pytest.mark.parametrize("step", ["reserve", "charge"])
def test_a_step_runs_again_only_if_the_crash_came_before_its_record(
    shop: Shop, flow_app: FlowApp, flow_crash: FlowCrash, step: str, when: Any, times: int
) -> None:
    handle = shop.fulfil.start("o1")
    flow_crash.at(step, when=when)
    assert handle.result() == [*PAID, None]
    once = {"reserve": 1, "charge": 2}  # which is charged twice
    assert Counter(flow_app.ran) == once | {step: once[step] + times - 1}


def test_a_crash_costs_a_lease_and_shows_in_the_history(
    shop: Shop, flow_app: FlowApp, flow_clock: FlowClock, flow_crash: FlowCrash
) -> None:
    handle = shop.fulfil.start("o1")
    flow_crash.at("reserve")
    flow_clock.advance(seconds=29)
    assert history(handle) == ["created", "started"]
    flow_clock.advance(seconds=2)
    assert_history(handle, ["created", "started", "reclaimed", "step_succeeded reserve", ..., "waiting sleep"])


def test_a_step_that_kills_every_worker_is_lost(shop: Shop, flow_app: FlowApp, flow_crash: FlowCrash) -> None:
    @shop.flows.flow("poisoned")
    def poisoned(run: Run) -> Any:
        try:
            return run.step(shop.charge, "o1", 1)
        except StepFailed as failed:
            return failed.type

    handle = poisoned.start()
    flow_crash.at("charge", times=5)
    assert handle.result() == "StepLost"
    assert flow_app.ran == ["charge"] * 5


def test_the_dead_write_and_send_nothing(shop: Shop, flow_app: FlowApp, flow_crash: FlowCrash) -> None:
    @shop.flows.flow("clings to life")
    def clings(run: Run) -> None:
        try:
            run.step(shop.reserve, "o1")
        finally:
            shop.seen.append("unwound")
            shop.ship.start("from the dead")

    handle = clings.start()
    flow_crash.at("reserve")
    flow_app.run()
    assert shop.seen == ["unwound"]
    assert [flow.id for flow in flow_app.store.list_by_owner("default")] == [handle.id]


def test_a_fault_that_did_not_happen_fails_the_test(
    shop: Shop, flow_app: FlowApp, flow_crash: FlowCrash, flow_messages: FlowMessages
) -> None:
    shop.ship.start("o1").result()
    flow_crash.at("charge", when="after")
    flow_messages.drop("fulfil")
    with pytest.raises(NeverStruck) as said:
        flow_app.check_struck()
    assert "flow_crash.at('charge', when='after'); flow_messages.drop('fulfil')" in str(said.value)
    assert "Messages were for: ship" in str(said.value)
    shop.fulfil.start("o1")
    flow_messages.drop("fulfil")  # the first of the two takes this one, too
    shop.fulfil.start("o2").result()


def test_a_name_that_is_mistyped_is_told_of_with_the_one_that_was_meant(shop: Shop, sqlite_url: str) -> None:
    with open_flow_app(shop.app, sqlite_url) as flow_app:  # of the fixture's, pytest would be told the same
        flow_app.crash.at("chrage")
        flow_app.messages.drop("fullfil")
        flow_app.crash.at("reserve", times=2)
        shop.fulfil.start("o1").result()
        flow_app.crash.at("reserve")
        with pytest.raises(NeverStruck) as said:
            flow_app.check_struck()
    assert "flow_crash.at('chrage', when='during') (did you mean 'charge'?)" in str(said.value)
    assert "flow_messages.drop('fullfil') (did you mean 'fulfil'?)" in str(said.value)
    assert "'reserve'?" not in str(said.value)


def test_faults_are_asked_for_by_name_and_number(
    shop: Shop, flow_crash: FlowCrash, flow_messages: FlowMessages
) -> None:
    with pytest.raises(InvalidData, match=r"flow_crash\.at: takes a name, 'charge', not a"):
        flow_crash.at(shop.charge)  # type: ignore[arg-type]
    with pytest.raises(InvalidData, match=r"flow_messages\.drop: takes a name, 'fulfil', not a FlowDefinition"):
        flow_messages.drop(shop.fulfil)  # type: ignore[arg-type]
    for times in (0, -1, True):
        with pytest.raises(InvalidData, match=r"flow_crash\.at: times is a whole number from 1"):
            flow_crash.at("charge", times=times)
        with pytest.raises(InvalidData, match=r"flow_messages\.duplicate: times is a whole number from 1"):
            flow_messages.duplicate("charge", times=times)


def test_a_crash_has_three_moments(flow_crash: FlowCrash) -> None:
    with pytest.raises(InvalidData, match="before, during, after"):
        flow_crash.at("charge", when="later")  # type: ignore[arg-type]


@pytest.mark.parametrize(("when", "times"), [("before", 1), ("during", 2), ("after", 1)])
@pytest.mark.parametrize("name", ["pay", "shop.charge", "charge_card"])
def test_a_tasks_body_as_a_plain_step_goes_by_either_name(
    shop: Shop, flow_app: FlowApp, flow_crash: FlowCrash, name: str, when: Any, times: int
) -> None:
    @shop.app.task(name="shop.charge", shared=False, bind=True, autoretry_for=(ConnectionError,))
    def charge_card(self: Any, cents: int) -> int:
        return cents

    @shop.flows.flow("charges")
    def charges(run: Run) -> int:
        step = run.options(name="pay") if name == "pay" else run
        return int(step.step(charge_card.run, 5))

    flow_crash.at(name, when=when)
    assert charges.start().result() == 5
    assert flow_app.ran == ["pay" if name == "pay" else "charge_card"] * times


def test_a_plain_step_is_not_taken_for_a_task_whose_function_has_its_name(
    shop: Shop, flow_app: FlowApp, flow_crash: FlowCrash
) -> None:
    @shop.app.task(name="shop.reserve", shared=False)
    def reserve(order: str) -> int:
        return 4

    @shop.flows.flow("reserves")
    def reserves(run: Run) -> list[int]:
        return [run.step(shop.reserve, "o1"), run.step(reserve, "o1")]

    flow_crash.at("shop.reserve", when="after")
    handle = reserves.start()
    flow_app.run()
    assert handle.result() == [3, 4]
    assert_history(handle, ["created", "started", "step_succeeded reserve", ..., "step_succeeded shop.reserve", ...])
    assert flow_app.ran == ["reserve", "shop.reserve"]


@pytest.mark.parametrize(("when", "times"), [("before", 1), ("during", 2), ("after", 1)])
def test_a_transactional_step_takes_effect_once_whenever_the_crash_comes(
    shop: Shop, flow_app: FlowApp, flow_crash: FlowCrash, when: Any, times: int
) -> None:
    table = sa.Table("entries", sa.MetaData(), sa.Column("name", sa.Text()))
    with flow_app.store.engine.begin() as connection:
        table.create(connection)

    def enter(session: Session) -> str:
        session.execute(sa.insert(table).values(name="once"))
        return "entered"

    @shop.flows.flow("enters")
    def enters(run: Run) -> str:
        return run.transaction(enter)

    flow_crash.at("enter", when=when)
    assert enters.start().result() == "entered"
    assert flow_app.ran == ["enter"] * times
    with flow_app.store.engine.connect() as connection:
        assert connection.scalars(sa.select(table)).all() == ["once"]


# ---- messages -------------------------------------------------------------------------------------------------------


def test_lost_and_doubled_messages_do_no_harm(
    shop: Shop, flow_app: FlowApp, flow_clock: FlowClock, flow_messages: FlowMessages
) -> None:
    flow_messages.drop("fulfil")
    flow_messages.duplicate("charge", times=2)
    handle = shop.fulfil.start("o1")
    flow_app.run()
    assert handle.status() is FlowStatus.CREATED
    flow_clock.advance(seconds=6)
    assert handle.status() is FlowStatus.WAITING
    assert handle.result() == [*PAID, None]
    assert flow_app.ran == ["reserve", "charge", "charge"]


def test_messages_can_be_looked_at(shop: Shop, flow_app: FlowApp, flow_messages: FlowMessages) -> None:
    @shop.flows.flow("routed", queue="slow")
    def routed(run: Run) -> Any:
        return run.step(shop.charge.s("o1", 1).set(queue="payments", priority=9))

    routed.start().result()
    sent = [(message.task, message.queue, message.priority) for message in flow_messages.sent]
    assert sent == [("routed", "slow", None), ("charge", "payments", 9), ("routed", "slow", None)]
    shop.app.conf.task_default_queue = "by default"
    shop.ship.start("o1")
    assert flow_messages.sent[-1].queue == "by default"


# ---- flows that do not end ------------------------------------------------------------------------------------------


def test_who_waits_in_vain_is_told_what_for(shop: Shop, flow_app: FlowApp) -> None:
    @shop.flows.flow("waits")
    def waits(run: Run, order: str) -> None:
        run.wait_for("payment", order)

    @shop.flows.flow("waits for the other")
    def parent(run: Run) -> None:
        run.flow(waits, "o1")

    paused = shop.ship.start("o2")
    shop.flows.manager.pause(paused.id)
    with pytest.raises(Stuck) as said:
        parent.start().result()
    assert "waits for an event that nobody has sent: flows.emit('payment', 'o1', …)" in str(said.value)
    assert "waits for its steps: waits" in str(said.value)
    assert "is paused: flows.manager.unpause(…) lets it go on" in str(said.value)


def test_a_flow_that_spins_is_stopped(shop: Shop, flow_app: FlowApp) -> None:
    @shop.flows.flow("polls")
    def polls(run: Run) -> None:
        while True:
            run.step(again)
            run.sleep(timedelta(seconds=1))

    def again() -> None: ...

    flow_app.patience_seconds = 1.0
    with pytest.raises(Spins, match=r"\(polls\) does not come to rest: after 1 s .* the last of them: again, again"):
        polls.start().result()

    @shop.flows.flow("never pauses")
    def never_pauses(run: Run) -> None:
        while True:
            run.step(again)

    handle = never_pauses.start()
    with pytest.raises(Spins, match=f"flow {handle.id} "):
        flow_app.run()


def test_what_is_not_registered_is_named(shop: Shop, flow_app: FlowApp) -> None:
    other = Celery("elsewhere", set_as_current=False)

    @other.task(name="elsewhere.only", shared=False)
    def only() -> None: ...

    @shop.flows.flow("calls elsewhere")
    def calls(run: Run) -> None:
        run.step(only)

    calls.start()
    with pytest.raises(Stuck, match=r"has a step 'elsewhere.only', and the app has no task of that name"):
        flow_app.run()

    @Flows(other).flow("theirs")
    def theirs(run: Run) -> None: ...

    @shop.flows.flow("calls theirs")
    def calls_theirs(run: Run) -> None:
        run.flow(theirs)

    calls_theirs.start()
    with pytest.raises(UnknownFlow, match=r"no flow definition 'theirs'; registered are: .*fulfil"):
        flow_app.run()


def test_a_flow_whose_code_is_another_is_told_of_at_once(shop: Shop, flow_app: FlowApp) -> None:
    names = iter(["one", "other"])

    @shop.flows.flow("changes")
    def changes(run: Run) -> None:
        run.options(name=next(names)).step(dict)
        run.sleep(timedelta(days=1))

    with pytest.raises(Stuck, match=r"\(changes\) is left alone: step 1 of the history is 'one', but .* 'other'"):
        changes.start().result()


# ---- history --------------------------------------------------------------------------------------------------------


def test_a_history_is_compared_line_by_line(shop: Shop, flow_app: FlowApp) -> None:
    handle = shop.ship.start("o1")
    flow_app.run()
    assert_history(handle, ["created", "started", "waiting sleep"])
    assert_history(handle, [...])
    assert_history(handle, ["created", ..., "waiting sleep"])
    assert_history(handle, [..., "started", ...])
    assert_history(handle, ["created", "started", "waiting sleep", ...])
    wrong_ones: list[list[Any]] = [[], ["created"], ["created", ..., "started"], [..., "waiting sleep", ..., "started"]]
    for wrong in wrong_ones:
        with pytest.raises(AssertionError):
            assert_history(handle, wrong)
    with pytest.raises(AssertionError) as said:
        assert_history(handle, ["created", "started", "step_succeeded pay"])
    assert str(said.value).splitlines()[1:] == ["  created", "  started", "- step_succeeded pay", "+ waiting sleep"]


@pytest.mark.parametrize("limit", [None, 1, 3])
def test_it_can_be_told_how_many_members_were_out_at_once(
    shop: Shop, flow_app: FlowApp, flow_clock: FlowClock, limit: int | None
) -> None:
    @shop.flows.flow("many")
    def many(run: Run) -> None:
        run.step(shop.charge, "o0", 1)
        run.gather([shop.charge.s(f"o{number}", 1) for number in range(7)], limit=limit)
        run.gather([shop.ship.s(f"o{number}") for number in range(7)], limit=limit)

    handle = many.start()
    flow_app.run()
    assert most_at_once(handle, "ship") == (limit or 7)  # they are still out
    assert handle.result() is None
    assert [most_at_once(handle, name) for name in ("charge", "ship")] == [limit or 7] * 2
    with pytest.raises(InvalidData, match="has had no step 'shop'; its steps are charge, ship"):
        most_at_once(handle, "shop")


# ---- without a store ------------------------------------------------------------------------------------------------


def test_a_flow_function_can_be_called_as_one(shop: Shop) -> None:
    def charge(order: str, cents: int) -> str:
        return f"{cents} cents"

    steps: dict[str, Any] = {"charge": charge, "ship": lambda order: f"{order} on its way"}
    result = run_inline(shop.fulfil, "o1", steps=steps, events={"approval": {"by": "Ada"}})
    assert result == ["300 cents", "1 cents", "o1 on its way", {"by": "Ada"}]
    assert run_inline(shop.fulfil, "o1") == [*PAID, None]


def test_inline_a_flow_has_what_a_flow_has(shop: Shop) -> None:
    tried: list[int] = []

    def flaky() -> int:
        tried.append(1)
        if len(tried) < 3:
            raise ValueError("not yet")
        return len(tried)

    def undo(what: str) -> None:
        shop.seen.append(f"undone {what}")

    @shop.flows.flow("of all kinds", retry=Retry(max_attempts=3))
    def kinds(run: Run) -> list[Any]:
        run.on_failure(undo, "first")
        began = run.now()
        run.sleep(timedelta(days=90))
        passed = run.now() - began
        run.update(progress=1)
        first = run.first([shop.charge.s("o1", 1), shop.charge.s("o1", 2)]).value
        granted = run.approval("manager").granted
        run.on_failure(undo, "second")
        return [run.step(flaky), passed.days, first, granted, run.gather([flaky, shop.charge.s("o1", 3)])]

    approval = Approval(granted=True, by="Ada", at=datetime.now(UTC))
    seen = run_inline(kinds, events={"approval manager": approval})
    assert seen == [3, 90, "paid 1 for o1", True, [4, "paid 3 for o1"]]
    assert shop.seen == []
    tried.clear()
    with pytest.raises(StepFailed, match="step charge failed with ZeroDivisionError"):
        run_inline(kinds, events={"approval manager": approval}, steps={"charge": lambda order, cents: 1 // 0})
    assert shop.seen == ["undone first"]


def test_inline_a_step_that_fails_raises_what_it_raises_live(shop: Shop) -> None:
    def broken(order: str, cents: int) -> str:
        raise ValueError("no money left")

    with pytest.raises(StepFailed, match="step charge failed with ValueError: no money left"):
        run_inline(shop.fulfil, "o1", steps={"charge": broken})
    with pytest.raises(InvalidData, match="input: Input should be a valid string"):
        run_inline(shop.fulfil, 5)  # type: ignore[misc]


def test_inline_what_stands_in_for_nothing_is_told_of(shop: Shop) -> None:
    """A mistyped name had the task itself run."""

    def stub(*_: Any) -> str:
        return "stub"

    with pytest.raises(InvalidData, match=r"steps: 'chrage' \(did you mean 'charge'\?\) is no Celery task"):
        run_inline(shop.fulfil, "o1", steps={"chrage": stub})
    with pytest.raises(InvalidData, match=r"'reserve' is no Celery task .* plain functions are yours to patch"):
        run_inline(shop.fulfil, "o1", steps={"reserve": stub})
    assert run_inline(shop.ship, "o1", steps={"charge": stub}) == "shipped o1"  # not called this time


def test_inline_says_what_it_cannot_do(shop: Shop) -> None:
    @shop.flows.flow("waits for ever")
    def waits(run: Run) -> None:
        try:
            run.wait_for("payment", "o1")
        except Exception:
            shop.seen.append("caught")

    def write(session: Session) -> None: ...

    @shop.flows.flow("writes")
    def writes(run: Run) -> None:
        run.transaction(write)

    with pytest.raises(Stuck, match=r"waits for the event 'payment': give run_inline its payload"):
        run_inline(waits)

    @shop.flows.flow("starts anew")
    def anew(run: Run) -> None:
        run.restart_as()

    with pytest.raises(NotInline, match=r"run.transaction needs a store, and run_inline has none"):
        run_inline(writes)
    with pytest.raises(NotInline, match=r"run.restart_as needs a store"):
        run_inline(anew)
    assert shop.seen == []


# ---- what is given, and given back ----------------------------------------------------------------------------------


def test_afterwards_the_application_is_as_it_was(
    shop: Shop, tmp_path: Any, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", NOBODY)
    monkeypatch.setenv("FLOW_STORE_URL", f"sqlite:///{tmp_path}/production.sqlite")
    assert shop.flows.settings.lease_seconds == 30
    changes = dict(shop.app.conf.changes or {})
    before = vars(shop.flows.runtime).copy()
    read = clock.read
    with open_flow_app(shop.app, sqlite_url) as flow_app:
        assert shop.app.conf.broker_write_url == "memory://localhost//"
        assert shop.ship.start("o1").result() == "shipped o1"
        assert flow_app.clock.now() - datetime.now(UTC) > timedelta(hours=23)
    assert vars(shop.flows.runtime) == before
    assert shop.app.conf.changes == changes
    assert os.environ["CELERY_BROKER_URL"] == NOBODY
    assert shop.app.connection_for_write().port == 1
    assert clock.read is read
    assert not (tmp_path / "production.sqlite").exists()
    store = SqlFlowStore(make_engine(sqlite_url))
    assert store.run(op.now) - datetime.now(UTC) < timedelta(minutes=1)
    store.close()


def test_what_is_set_after_the_kit_counts(shop: Shop, sqlite_url: str, tmp_path: Any) -> None:
    """A test with real servers in the same process was told that its flow_store_url is not set."""
    run_inline(shop.fulfil, "o1")
    with open_flow_app(shop.app, sqlite_url) as flow_app:
        assert shop.fulfil.start("o1").result() == [*PAID, None]
        assert str(shop.app.timezone) == "UTC"
        assert flow_app.messages.sent[0].queue == shop.app.main
    url = f"sqlite:///{tmp_path}/another.sqlite"
    shop.app.conf.update(
        flow_store_url=url, flow_lease_seconds=5, task_routes={"charge": {"queue": "payments"}},
        timezone="Europe/Berlin",
    )  # fmt: skip
    assert (shop.flows.settings.store_url, shop.flows.settings.lease_seconds) == (url, 5)
    assert str(shop.app.timezone) == "Europe/Berlin"
    assert shop.app.amqp.router.route({}, "charge")["queue"].name == "payments"


def configured(app: Celery, how: str) -> Celery:
    """The app, with a broker that is not there."""
    if how == "by an attribute":
        app.conf.update(broker_url=NOBODY)
    elif how == "by an object":
        app.config_from_object({"broker_url": NOBODY})
    elif how == "under a namespace":
        app.config_from_object({"CELERY_BROKER_URL": NOBODY}, namespace="CELERY")
    return app


@pytest.mark.parametrize("how", ["not at all", "by an attribute", "by an object", "under a namespace"])
def test_what_steps_send_of_their_own_stays_in_memory_however_the_broker_is_configured(
    sqlite_url: str, how: str
) -> None:
    app = configured(Celery(f"sends-{next(_numbers)}", set_as_current=False), how)

    @app.task(name="sent", shared=False)
    def sent() -> None: ...

    def send() -> None:
        sent.delay()

    @Flows(app).flow("sends")
    def sends(run: Run) -> None:
        run.step(send)

    with open_flow_app(app, sqlite_url):
        assert sends.start().result() is None
    like_it = configured(Celery("untouched", set_as_current=False), how)
    assert app.conf.broker_write_url == like_it.conf.broker_write_url


def test_a_database_with_flows_of_somebody_elses_is_not_emptied(shop: Shop, database_url: str) -> None:
    with open_flow_app(shop.app, database_url):
        shop.ship.start("of a test")
    with open_flow_app(shop.flows, database_url) as again:
        assert again.store.list_by_owner("default") == []
    store = SqlFlowStore(make_engine(database_url))
    with store.engine.begin() as connection:
        wipe(connection)
    kept = FlowManager(store).create_managed(controller_id="kept", owner_session_key="o").id
    with (
        pytest.raises(InvalidData, match="flow_store_url: names a database with flows in it"),
        open_flow_app(shop.app, database_url),
    ):
        pass
    assert store.get(kept) is not None
    store.close()


def test_an_app_without_flows_is_told_so(sqlite_url: str) -> None:
    bare = Celery("bare", set_as_current=False)
    with pytest.raises(InvalidData, match="'bare' has no flows"), open_flow_app(bare, sqlite_url):
        pass
    with pytest.raises(InvalidData, match="is a str; name your Celery app"), open_flow_app("shop", sqlite_url):  # type: ignore[arg-type]
        pass
