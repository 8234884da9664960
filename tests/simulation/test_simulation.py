"""The simulation in the small: a few hundred seeds of every scenario, and every rule taken away once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from celery_flows.store import LeaseLost
from celery_flows.tasks.lease import surely_held
from tests.simulation.mutants import HARMLESS, MUTANTS, Harmless, Mutant
from tests.simulation.run import Run, own_machine
from tests.simulation.scenarios import SCENARIOS, Scenario
from tests.simulation.world import Violation, World, later

SEEDS = 8  # of each scenario; `python -m tests.simulation` plays as many as you like
SEARCH = 500  # seeds in which a missing rule must show


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Failing steps and lost leases are what happens here all the time."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_no_interleaving_breaks_a_promise(scenario: Scenario) -> None:
    for seed in range(SEEDS):
        Run(seed, scenario).play()


def test_a_renewal_that_took_longer_than_a_lease_is_not_trusted() -> None:
    world = World(0)
    claim = SimpleNamespace(run_id="step", fence=1, worker="worker")
    asked: list[float] = []

    def renew(_: object, holder: object, lease: float) -> bool:
        asked.append(world.boottime())
        if len(asked) == 1:
            world.clock += later(lease + 1)  # the process is stopped, and goes on only now
            return True
        return False  # by then another worker has taken over

    runtime: Any = SimpleNamespace(store=SimpleNamespace(run=renew), settings=SimpleNamespace(lease_seconds=30.0))
    holder: Any = claim
    with own_machine(), pytest.raises(LeaseLost):
        surely_held(runtime, holder, until=0.0)

    assert asked == [0.0, 31.0]


def test_a_seed_replays_exactly() -> None:
    for seed in range(SEEDS):
        first, second = Run(seed), Run(seed)
        first.play()
        second.play()
        assert first.world.log == second.world.log


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_rule_that_is_missing_is_noticed(mutant: Mutant) -> None:
    with mutant.planted():
        for seed in range(mutant.first_seed, mutant.first_seed + SEARCH):
            if violation_of(mutant, seed) is not None:
                return
    pytest.fail(f"{SEARCH} seeds did not notice that {mutant.name}")


@pytest.mark.parametrize("harmless", HARMLESS, ids=lambda harmless: harmless.mutant.name)
def test_a_rule_that_another_makes_up_for_may_be_missing(harmless: Harmless) -> None:
    with harmless.mutant.planted():
        for seed in range(SEEDS * len(harmless.mutant.scenarios)):
            assert violation_of(harmless.mutant, seed) is None, harmless.because


def violation_of(mutant: Mutant, seed: int) -> Violation | None:
    """What the simulation finds with this seed, in one of the mutant's scenarios."""
    scenarios = [scenario for scenario in SCENARIOS if scenario.name in mutant.scenarios]
    assert len(scenarios) == len(mutant.scenarios), "a scenario's name is wrong"
    try:
        Run(seed, scenarios[seed % len(scenarios)]).play()
    except Violation as violation:
        return violation
    return None
