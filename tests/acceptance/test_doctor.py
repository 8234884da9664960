"""The doctor and real workers: work on a queue that nobody serves is found, and no longer once somebody does."""

from __future__ import annotations

import os
import signal

from celery_flows.worker.doctor import examine
from tests.acceptance.conftest import Town
from tests.support.waiting import until


def kinds(town: Town) -> set[str]:
    return {finding.kind for finding in examine(town.shop.flows.runtime)}


def test_a_queue_with_work_and_no_consumer_is_found(town: Town) -> None:
    handle = town.shop.held_step.start("work")
    assert "no_consumer" in kinds(town)
    elsewhere = town.worker("-Q", "another queue", "-c", "1")
    assert "no_consumer" in kinds(town)
    worker = town.worker()
    until(lambda: town.shop.effects.read("work began"), "the step began", within_seconds=30)
    until(lambda: kinds(town) == {"beat_silent"}, "only beat is missing")
    late = town.shop.held_inline.start("late")
    os.kill(worker.process.pid, signal.SIGSTOP)  # it is there, and does not answer
    until(lambda: "no_consumer" in kinds(town), "a worker that does not answer is none", within_seconds=30)
    os.kill(worker.process.pid, signal.SIGCONT)
    town.shop.open_gate()
    assert [handle.result(timeout=40), late.result(timeout=40)] == ["work", "late"]
    assert elsewhere.process.poll() is None
