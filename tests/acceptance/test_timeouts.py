"""Steps that take too long, under each kind of pool: interrupted, ended with their process, or judged in the end."""

from __future__ import annotations

import pytest

from tests.acceptance.conftest import Town
from tests.support.waiting import until
from tests.support.workers import is_alive

LATE = "took longer than 0.3 s"


def test_processes_interrupt_a_step_and_are_ended_over_one_that_does_not_heed(town: Town) -> None:
    worker = town.worker("-c", "2")
    handle = town.shop.bounded.start("processes")
    assert handle.result(timeout=40) == [LATE, "dawdled"]
    [first, second] = [effect["pid"] for effect in town.shop.effects.read("dawdle")]
    until(lambda: not is_alive(first), "the process that hung is gone")
    assert first != second
    assert "Hard time limit (1s) exceeded" in worker.output
    steps = {step.task: step for step in town.shop.flows.store.list_steps(handle.id)}
    assert steps["shop.dawdle"].attempt == 2
    retried = [event for event in town.shop.flows.store.list_events(handle.id) if event.kind == "step_retrying"]
    assert [event.payload_json["step"]["error_json"]["type"] for event in retried] == ["StepTimedOut"]


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_one_process_for_all_interrupts_or_judges_in_the_end(town: Town, pool: str) -> None:
    town.worker("-P", pool)
    assert town.shop.bounded.start("threads").result(timeout=30) == [LATE]
    assert town.shop.effects.counts()["oversleep"] == 1
