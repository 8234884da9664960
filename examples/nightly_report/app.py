"""The Celery app and its flow. A night's report is of the day that ended with it, whenever it is made: its slot says
which night that is, the clock does not matter."""

from __future__ import annotations

import os
from datetime import date, datetime, timedelta

from celery import Celery
from celery.schedules import crontab
from pydantic import BaseModel

from celery_flows import Flows, Retry, Run

app = Celery("nightly_report")
app.conf.update(task_default_queue="reports", worker_prefetch_multiplier=1, timezone="Europe/Berlin")
flows = Flows(app)

SHOPS = ["north", "south", "west"]

# At three in the morning; for a short run, every so many seconds.
SECONDS = os.environ.get("NIGHTLY_REPORT_SECONDS")
NIGHT = crontab(hour=3, minute=0) if SECONDS is None else float(SECONDS)


class Report(BaseModel):
    """What was sold in a day."""

    day: date
    cents: int


@app.task(autoretry_for=(ConnectionError,), max_retries=3)
def sales_of(shop: str, day: str) -> int:
    """What a shop sold on a day: a query, in a real application."""
    return 100 * len(shop) + date.fromisoformat(day).day


def publish(report: Report) -> str:
    """Writes the report to where it is read. The day is its name: doing so twice does no harm."""
    return f"report of {report.day}: {report.cents}"


@flows.flow("reports/nightly", schedule=NIGHT, catch_up="all", overlap="wait", retry=Retry(max_attempts=3))
def nightly(run: Run, slot: datetime) -> str:
    """Ends with what was published."""
    day = slot.astimezone(app.timezone).date() - timedelta(days=1)
    sales = run.gather([sales_of.s(shop, day.isoformat()) for shop in SHOPS])
    return run.step(publish, Report(day=day, cents=sum(sales)))
