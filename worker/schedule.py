"""Beat's entries. They are added, never assigned, so they merge with the application's own schedule."""

from __future__ import annotations

from typing import Any

from celery import Celery
from celery.schedules import crontab

from celery_flows.tasks.celery_tasks import PRUNE_TASK, SWEEP_TASK

BEAT_SWEEP_SECONDS = 10.0  # beat only stands in for workers that are all dead or stuck; they sweep by themselves
PRUNE_AT = crontab(hour=3, minute=30)  # a crontab, not an interval: a restart of beat would begin an interval anew


def add_beat_entries(app: Celery) -> None:
    """Has beat sweep and prune. Any number of beats may run: the chores can be done twice at no harm."""

    # Strongly referenced: Celery keeps receivers weakly by default.
    @app.on_after_finalize.connect(weak=False)
    def _add(sender: Celery, **_: Any) -> None:
        sender.add_periodic_task(
            BEAT_SWEEP_SECONDS,
            sender.signature(SWEEP_TASK),
            name="celery-flows: sweep",
            expires=BEAT_SWEEP_SECONDS,
        )
        sender.add_periodic_task(PRUNE_AT, sender.signature(PRUNE_TASK), name="celery-flows: prune")
