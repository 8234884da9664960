"""A job elsewhere, which tells nobody when it has ended: it is looked at each minute, for two hours at most."""

from __future__ import annotations

from datetime import timedelta

from celery import Celery

from celery_flows import Flows, Retry, Run
from tests.scenarios.outside import outside as exporter

app = Celery("exports", set_as_current=False)
flows = Flows(app)


class ExportBroken(Exception):
    """The job has ended without a file."""


def begin_export(table: str, request: str) -> str:
    return exporter.ask(f"begin {table}", key=request)


def look(job: str) -> str:
    return exporter.ask(f"look at {job}")


def fetch(job: str) -> str:
    return exporter.ask(f"fetch {job}")


def abort(job: str) -> None:
    exporter.ask(f"abort {job}", key=f"abort {job}")


@flows.flow("exports/export", timeout=timedelta(hours=2), retry=Retry(max_attempts=4))
def export(run: Run, table: str) -> str:
    job = run.step(begin_export, table, str(run.uuid()))
    run.on_failure(abort, job)
    while (state := run.step(look, job)) == "running":
        run.sleep(timedelta(minutes=1))
    if state != "ready":
        raise ExportBroken(f"{job} is {state}")
    return run.step(fetch, job)
