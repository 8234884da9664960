"""Fixtures for the tests with real brokers, real worker processes and real faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from kombu import pools

from tests.support.brokers import Broker, new_queue, rabbitmq_broker, redis_broker
from tests.support.fold import assert_whole
from tests.support.shop import BROKER, DATABASE, EFFECTS, QUEUE, Shop, open_shop
from tests.support.workers import Beat, Worker


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with redis_broker(tmp_path_factory.mktemp("redis")) as broker:
        yield broker


@pytest.fixture(scope="session")
def rabbitmq_server() -> Iterator[Broker]:
    with rabbitmq_broker() as broker:
        yield broker


@pytest.fixture(params=["redis", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> Broker:
    """A broker of each kind: the test runs once with each."""
    found: Broker = request.getfixturevalue(f"{request.param}_server")
    return found


class Town:
    """A shop, as its customers see it, and the workers that serve it."""

    def __init__(self, broker_url: str, database_url: str, directory: Path) -> None:
        self.queue = new_queue()
        self.directory = directory
        self.environment = {
            BROKER: broker_url, DATABASE: database_url, QUEUE: self.queue, EFFECTS: str(directory / "effects.jsonl"),
        }  # fmt: skip
        self._stack = ExitStack()
        self.shop: Shop = open_shop(self.environment)
        self._stack.callback(self.shop.app.close)
        self._stack.callback(pools.reset)  # the connections that messages went out on
        self._stack.callback(lambda: self.shop.flows.store.close())
        self.workers: list[Worker] = []
        self.beats: list[Beat] = []

    def worker(self, *options: str, ready: bool = True, **environment: str) -> Worker:
        """Starts one more worker, and waits until it is ready."""
        worker = Worker({**self.environment, **environment}, self.directory, *options)
        self._stack.callback(worker.end)
        self.workers.append(worker)
        if ready:
            worker.wait_ready()
        return worker

    def beat(self, schedule: str, **environment: str) -> Beat:
        """Starts one more beat, with the schedule file of this name."""
        beat = Beat({**self.environment, **environment}, self.directory, self.directory / schedule)
        self._stack.callback(beat.end)
        self.beats.append(beat)
        return beat

    def audit(self) -> None:
        """Every history is whole."""
        for flow in self.shop.flows.store.list_by_owner("default", None):
            assert_whole(self.shop.flows.store, flow.id)

    def logs(self) -> str:
        processes: list[Worker | Beat] = [*self.workers, *self.beats]
        return "\n".join(f"--- {process.name}\n{process.output}" for process in processes)

    def close(self) -> None:
        self._stack.close()


MakeTown = Callable[..., Town]


@pytest.fixture
def make_town(postgresql_url: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[MakeTown]:
    """Opens towns; their histories must be whole in the end. Of a test that failed the workers' logs are shown."""
    towns: list[Town] = []

    def make(broker_url: str, database_url: str | None = None) -> Town:
        directory = tmp_path / f"town-{len(towns)}"
        directory.mkdir()
        towns.append(Town(broker_url, database_url or postgresql_url, directory))
        return towns[-1]

    try:
        yield make
        for town in towns:
            town.audit()
    finally:
        for town in towns:
            town.close()
            print(town.logs())  # noqa: T201  # shown by pytest if the test failed


@pytest.fixture
def town(make_town: MakeTown, broker: Broker) -> Town:
    return make_town(broker.url)
