"""Each scenario's own application, on a clock that the test moves, or with workers that are killed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import pools

from celery_flows import FlowHandle, Flows, SqlFlowStore
from celery_flows.worker.embedded import Processes, await_fact
from tests.scenarios.gate import GATE
from tests.scenarios.ledger import LEDGER, Ledger
from tests.support.brokers import Broker, redis_broker
from tests.support.effects import EffectLog
from tests.support.fold import assert_whole
from tests.support.waiting import until
from tests.support.workers import is_alive

SHORT = {"FLOW_LEASE_SECONDS": "3", "FLOW_SWEEP_SECONDS": "0.2", "FLOW_REPUBLISH_SECONDS": "2"}


@pytest.fixture
def flow_celery_app(request: pytest.FixtureRequest) -> Flows:
    """The flows of the scenario's file."""
    found: Flows = request.module.flows
    return found


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """An empty one, the one that the scenario's steps use."""
    monkeypatch.setenv(LEDGER, str(tmp_path / "ledger.sqlite"))
    return Ledger()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with redis_broker(tmp_path_factory.mktemp("redis")) as broker:
        yield broker


class Killing:
    """Workers of a scenario's application over PostgreSQL and Redis. The first is killed where its step is held."""

    def __init__(self, module: Any, processes: Processes, gate: Path) -> None:
        self.module, self.processes = module, processes
        self.log = EffectLog(gate / "log.jsonl")

    def result(self, start: Callable[[], FlowHandle[Any]], held: str, outcome: Callable[[FlowHandle[Any]], Any]) -> Any:
        """What comes of a flow whose worker is killed, with SIGKILL and all its children, while the step ``held`` is at
        work, and whose second worker goes on."""
        self._start_worker("first")
        handle = start()
        until(lambda: self.log.read(held), f"{held} is at work", within_seconds=60)
        [reached] = self.log.read(held)
        self.processes.kill("first")
        until(lambda: not is_alive(reached["pid"]), "it is dead")
        assert not handle.status().is_terminal
        self._start_worker("second")
        told = outcome(handle)
        assert [reached["pid"] == each["pid"] for each in self.log.read(held)] == [True, False]
        assert_whole(self.module.flows.store, handle.id)
        return told

    def _start_worker(self, name: str) -> None:
        command = [sys.executable, "-m", "celery", "-A", self.module.__name__, "worker", "-c", "2", "-l", "info"]
        worker = self.processes.start(name, [*command, "-n", f"{name}@%h"])
        log = self.processes.log_of(name)
        await_fact(lambda: b" ready." in log.read_bytes(), worker, log, seconds=60)


@pytest.fixture
def killing(
    request: pytest.FixtureRequest, postgresql_url: str, redis_server: Broker, ledger: Ledger, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Killing]:  # fmt: skip
    module = request.module
    flows, app = module.flows, module.app
    gate = tmp_path / "gate"
    gate.mkdir()
    set_for_workers = {
        "FLOW_STORE_URL": postgresql_url, "CELERY_BROKER_URL": redis_server.url,
        GATE: str(gate), LEDGER: os.environ[LEDGER], **SHORT,
    }  # fmt: skip
    monkeypatch.setattr(flows.runtime, "_store", SqlFlowStore.open(postgresql_url))
    app.conf.update(broker_url=redis_server.url)
    with Processes(tmp_path / "workers", set_for_workers) as processes:
        yield Killing(module, processes, gate)
    flows.store.close()
    pools.reset()
