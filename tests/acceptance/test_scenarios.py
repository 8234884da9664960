"""Scenarios whose worker is killed in the middle of a step: what is recorded is not done again, the rest is done."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from kombu import pools

from celery_flows import FlowFailed
from celery_flows.store import SqlFlowStore
from celery_flows.store.engines import make_engine
from tests import scenarios
from tests.scenarios.outside import EFFECTS, Outside, outside
from tests.support.brokers import Broker, new_queue
from tests.support.fold import assert_whole
from tests.support.scenario_worker import SCENARIO, configure
from tests.support.shop import BROKER, DATABASE, QUEUE
from tests.support.waiting import until
from tests.support.workers import Worker

OpenStage = Callable[[str], "Stage"]


def imported_anew(scenario: str) -> Any:
    """The scenario's module with an app that nobody has used yet: an app reads its settings once."""
    path = Path(scenarios.__file__).with_name(f"{scenario}.py")
    spec = spec_from_file_location(f"staged_{scenario}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)  # where its annotations are looked up
    spec.loader.exec_module(module)
    return module


class Stage:
    """A scenario over real servers, and what is outside of it."""

    def __init__(self, scenario: str, environment: dict[str, str], directory: Path) -> None:
        self.environment, self.directory = {**environment, SCENARIO: scenario}, directory
        self.world: Outside = outside
        self.world.begin(Path(environment[EFFECTS]))
        self.module = imported_anew(scenario)
        configure(self.module.app, self.environment)
        self._stack = ExitStack()
        self._stack.callback(pools.reset)  # the connections that messages went out on
        self._stack.callback(lambda: self.module.flows.store.close())

    def worker(self) -> Worker:
        """Starts a prefork worker, and waits until it is ready."""
        worker = Worker(self.environment, self.directory, app="tests.support.scenario_worker")
        self._stack.callback(worker.end)
        worker.wait_ready()
        return worker

    def kill_at(self, what: str, start: Callable[[], Any]) -> Any:
        """Starts a flow, and kills the whole worker while the outside does this; another follows."""
        self.world.held.write_text(what)
        worker = self.worker()
        handle = start()
        until(lambda: what in self.world.asked, f"{what} is asked for", within_seconds=30)
        struck = self.world.log.read(what)[0]["pid"]
        assert struck in worker.kill()
        self.world.held.unlink()
        self.worker()
        return handle

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def open_stage(
    postgresql_url: str, redis_server: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[OpenStage]:
    """Opens a scenario. Every history must be whole in the end."""
    environment = {
        BROKER: redis_server.url, DATABASE: postgresql_url, QUEUE: new_queue(),
        EFFECTS: str(tmp_path / "effects.jsonl"),
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with ExitStack() as opened:

        def open_one(scenario: str) -> Stage:
            stage = Stage(scenario, environment, tmp_path)
            opened.callback(stage.close)
            return stage

        yield open_one
        with closing(SqlFlowStore(make_engine(postgresql_url))) as store:
            for flow in store.list_by_owner("default", None):
                assert_whole(store, flow.id)


def test_money_whose_deposit_dies_is_moved_once(open_stage: OpenStage) -> None:
    stage = open_stage("money_transfer")
    order = stage.module.Transfer(reference="r1", source="ann", target="bob", cents=500)
    handle = stage.kill_at("deposit 500 to bob", lambda: stage.module.transfer.start(order))
    assert handle.result(timeout=40) == ["withdraw 500 from ann", "deposit 500 to bob"]
    assert stage.world.asked == ["withdraw 500 from ann", "deposit 500 to bob", "deposit 500 to bob"]
    assert stage.world.done == ["withdraw 500 from ann", "deposit 500 to bob"]
    assert len({line["pid"] for line in stage.world.log.read("deposit 500 to bob")}) == 2


def test_a_trip_whose_undo_dies_is_given_back_whole(open_stage: OpenStage) -> None:
    stage = open_stage("trip")
    stage.world.refuse_everywhere("book flight")
    handle = stage.kill_at("cancel hotel", lambda: stage.module.book_trip.start(["car", "hotel", "flight"]))
    with pytest.raises(FlowFailed) as failed:
        handle.result(timeout=40)
    assert failed.value.undo_failed == ()
    assert stage.world.done == ["book car", "book hotel", "cancel flight", "cancel hotel", "cancel car"]
    assert stage.world.asked.count("cancel hotel") == 2
    assert stage.world.asked.count("book car") == stage.world.asked.count("cancel flight") == 1
    assert os.getpid() not in {line["pid"] for line in stage.world.log.read()}
