"""The database does not answer, or is away: tasks run on, and what was seen is written when it is back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
import sqlalchemy as sa
from celery import group

from celery_flows import FlowStatus, SqlFlowStore
from celery_flows.store.engines import make_engine
from celery_flows.tasks import recorder
from celery_flows.tasks.recorder import PATIENCE_SECONDS
from tests.integration.mirrored import MirroredShop
from tests.support.bench import Bench
from tests.support.fold import assert_whole
from tests.support.proxy import Proxy
from tests.support.waiting import until


@pytest.fixture
def shop(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[MirroredShop]:
    monkeypatch.setattr(recorder, "RETRY_SECONDS", 0.05)
    with closing(Bench(postgresql_url, mirror=True)) as bench:
        made = MirroredShop(bench)
        with made.observed(PATIENCE_SECONDS):
            yield made


@contextmanager
def unanswered(url: str) -> Iterator[None]:
    """Whoever writes a step waits."""
    engine = make_engine(url)
    with engine.connect() as connection:
        connection.exec_driver_sql("LOCK TABLE flow_steps IN ACCESS EXCLUSIVE MODE")
        yield
        connection.rollback()
    engine.dispose()


def test_tasks_run_on_while_the_database_does_not_answer(shop: MirroredShop) -> None:
    _, flow = shop.flows.mirror(group(shop.pick.s(n) for n in range(20))).apply_async()
    with unanswered(shop.bench.url):
        assert shop.consumer.run_all() == ["shop.pick"] * 20
    until(lambda: flow.status() is FlowStatus.FINISHED, "what was seen is written", within_seconds=30)
    assert_whole(shop.bench.store, flow.id)
    # Caught up, tasks wait for their own records again.
    _, next_flow = shop.flows.mirror(shop.pick.s(1)).apply_async()
    shop.consumer.run_all()
    until(lambda: next_flow.status() is FlowStatus.FINISHED, "the next flow is recorded")


def test_only_the_first_task_of_an_outage_waits(shop: MirroredShop) -> None:
    """Were it each of them, these would not come to their end within the time that a test has."""
    _, flow = shop.flows.mirror(group(shop.pick.s(n) for n in range(300))).apply_async()
    with unanswered(shop.bench.url):
        assert len(shop.consumer.run_all()) == 300
    until(lambda: flow.status() is FlowStatus.FINISHED, "what was seen is written", within_seconds=30)


def test_tasks_run_on_while_the_database_cannot_be_reached(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "RETRY_SECONDS", 0.05)
    gate = Gate(postgresql_url)
    with closing(Bench(postgresql_url, store=SqlFlowStore(gate.engine), mirror=True)) as bench:
        shop = MirroredShop(bench)
        with shop.observed(patience_seconds=60.0):  # a refusal ends the wait, not its length
            _, flow = shop.flows.mirror(group(shop.pick.s(n) for n in range(5))).apply_async()
            gate.shut()
            assert len(shop.consumer.run_all()) == 5
            gate.open()
            until(lambda: flow.status() is FlowStatus.FINISHED, "what was seen is written", within_seconds=30)
            assert_whole(bench.store, flow.id)


class Gate:
    """A database that can be put out of reach: its connections are refused at a closed port."""

    def __init__(self, url: str) -> None:
        self.engine = make_engine(url)
        self._there = sa.make_url(url)
        self._is_shut = False
        sa.event.listen(self.engine, "do_connect", self._address)

    def _address(self, _dialect: object, _record: object, _args: object, options: dict[str, object]) -> None:
        if self._is_shut:
            options |= {"host": "127.0.0.1", "port": 1}
        else:
            options |= {"host": self._there.host, "port": self._there.port or 5432}

    def shut(self) -> None:
        self._is_shut = True
        self.engine.dispose()

    def open(self) -> None:
        self._is_shut = False


def test_a_lost_reply_is_written_once(postgresql_url: str) -> None:
    with Proxy(postgresql_url) as proxy:
        store = SqlFlowStore(make_engine(proxy.url))
        with closing(Bench(postgresql_url, store=store, mirror=True)) as bench:
            shop = MirroredShop(bench)
            with shop.observed():
                _, flow = shop.flows.mirror(shop.pick.s(1)).apply_async()
                proxy.lose_reply("step_observed")
                shop.consumer.run_all()
                until(lambda: flow.status() is FlowStatus.FINISHED, "the flow ends", within_seconds=30)
            assert proxy.struck == 1
            events = assert_whole(store, flow.id)
            assert [event.kind for event in events] == ["created", *["step_observed"] * 3, "finished"]


def test_what_the_database_will_not_have_keeps_nothing_else_back(shop: MirroredShop) -> None:
    _, flow = shop.flows.mirror(group(shop.pick.s(n) for n in range(3))).apply_async()
    with shop.bench.store.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE flow_steps ADD CHECK (task <> 'shop.pack' OR status = 'pending')")
    _, refused = shop.flows.mirror(shop.pack.s(1)).apply_async()
    with unanswered(shop.bench.url):  # so that they are written together
        shop.consumer.run_all()
    until(lambda: flow.status() is FlowStatus.FINISHED, "the others are recorded", within_seconds=30)
    assert shop.told(refused) == ["pack pending"]


def test_what_is_kept_for_an_outage_is_bounded(
    shop: MirroredShop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recorder, "KEPT", 4)
    caplog.set_level("INFO", "celery_flows.mirror")
    shop.flows.mirror(group(shop.pick.s(n) for n in range(5))).apply_async()
    with unanswered(shop.bench.url):
        shop.consumer.run_all()
    until(lambda: "6 records were dropped" in caplog.text, "it says how many were dropped", within_seconds=30)
