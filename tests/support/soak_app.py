"""The application that a soak runs: flows of several kinds, each step leaving a line in the effect log."""

from __future__ import annotations

import os
import time
from datetime import timedelta

from celery import Celery

from celery_flows import Flows, Run
from tests.support.effects import EffectLog

EFFECT_LOG = "SOAK_EFFECT_LOG"

app = Celery("soak")
app.conf.update(task_default_queue="soak", worker_prefetch_multiplier=1)
flows = Flows(app)


def work(flow_id: str, name: str) -> str:
    """A step: takes a moment, then leaves its line."""
    time.sleep(0.02)
    EffectLog(os.environ[EFFECT_LOG]).append("step", flow=flow_id, step=name)
    return name


@app.task
def celery_work(flow_id: str, name: str) -> str:
    """A Celery step."""
    return work(flow_id, name)


@flows.flow("soak/inline")
def inline(run: Run) -> list[str]:
    """Steps in the driver's own process."""
    return [run.step(work, str(run.flow_id), f"inline-{number}") for number in range(6)]


@flows.flow("soak/gather")
def gather(run: Run) -> list[str]:
    """Celery steps, one after another and side by side."""
    first = run.step(celery_work, str(run.flow_id), "first")
    return [first, *run.gather(celery_work.s(str(run.flow_id), f"member-{number}") for number in range(6))]


@flows.flow("soak/waits")
def waits(run: Run) -> str:
    """A timer, then an event."""
    before = run.step(work, str(run.flow_id), "before")
    run.sleep(timedelta(seconds=1))
    event = run.wait_for("soak", str(run.flow_id))
    return before + run.step(work, str(run.flow_id), f"after-{event}")


KINDS = (inline, gather, waits)
