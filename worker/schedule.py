"""Beat's entries. They are added, never assigned, so they merge with the application's own schedule."""

from __future__ import annotations

from typing import Any

from celery import Celery
from celery.schedules import crontab

from celery_flows.tasks.celery_tasks import PRUNE_TASK, SWEEP_TASK, VERIFY_TASK
from celery_flows.tasks.maintenance import BEAT_SWEEP_SECONDS, HOUR_SECONDS

# Crontabs, not intervals: a restart of beat would begin an interval anew.
PRUNE_AT = crontab(hour=3, minute=30)
VERIFY_AT = crontab(minute=17)


def add_beat_entries(app: Celery) -> None:
    """Has beat sweep, prune and audit. Any number of beats may run: the chores can be done twice at no harm."""

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
        sender.add_periodic_task(
            VERIFY_AT, sender.signature(VERIFY_TASK), name="celery-flows: verify", expires=HOUR_SECONDS
        )
