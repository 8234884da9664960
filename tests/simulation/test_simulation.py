"""The simulation in the small: a few hundred seeds of every scenario, and every rule taken away once."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.simulation.mutants import MUTANTS, Mutant
from tests.simulation.run import Run
from tests.simulation.scenarios import SCENARIOS, Scenario
from tests.simulation.world import Violation

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


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_rule_that_is_missing_is_noticed(mutant: Mutant) -> None:
    scenarios = [scenario for scenario in SCENARIOS if scenario.name in mutant.scenarios]
    with mutant.planted():
        for seed in range(mutant.first_seed, mutant.first_seed + SEARCH):
            try:
                Run(seed, scenarios[seed % len(scenarios)]).play()
            except Violation:
                return
    pytest.fail(f"{SEARCH} seeds did not notice that {mutant.name}")
