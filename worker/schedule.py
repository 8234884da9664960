"""Beat's entries. They are added, never assigned, so they merge with the application's own schedule."""

from __future__ import annotations

from typing import Any

from celery import Celery
from celery.schedules import crontab

from celery_flows.tasks.celery_tasks import LOOK_TASK, PRUNE_TASK, SWEEP_TASK, VERIFY_TASK
from celery_flows.tasks.maintenance import BEAT_SWEEP_SECONDS, HOUR_SECONDS
from celery_flows.tasks.registry import FlowDefinition
from celery_flows.tasks.runtime import Runtime

# Crontabs, not intervals: a restart of beat would begin an interval anew.
PRUNE_AT = crontab(hour=3, minute=30)
VERIFY_AT = crontab(minute=17)


LOOK_EXPIRES_SECONDS = 60.0  # by then beat's next sweep has looked


def add_beat_entries(app: Celery, runtime: Runtime) -> None:
    """Has beat sweep, prune and audit, and look at schedules when their slots are. Any number of beats may run: all of
    it can be done twice at no harm."""

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
        for definition in runtime.registry:
            add_beat_entry(sender, definition)


def add_late_beat_entry(app: Any, definition: FlowDefinition[Any, Any]) -> None:
    """:func:`add_beat_entry`, for a definition that is made after the app was finalized."""
    if app.finalized:
        add_beat_entry(app, definition)


def add_beat_entry(app: Celery, definition: FlowDefinition[Any, Any]) -> None:
    """Has beat send for somebody to look at this definition's schedule, if it has one, whenever a slot is."""
    if definition.schedule is not None:
        app.add_periodic_task(
            definition.schedule.entry,
            app.signature(LOOK_TASK, kwargs={"name": definition.name}),
            name=f"celery-flows: {definition.name}",
            expires=LOOK_EXPIRES_SECONDS,
        )
