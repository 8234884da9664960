"""Every hour, and longer than an hour: the next one is left out, or waits, or begins beside."""

from __future__ import annotations

from datetime import datetime, timedelta

from celery import Celery

from celery_flows import Flows, Run
from tests.scenarios.outside import outside as warehouse

app = Celery("stock", set_as_current=False)
flows = Flows(app)

HOUR = timedelta(hours=1)


def count(slot: datetime) -> str:
    return warehouse.ask(f"count {slot:%H:%M}", key=slot.isoformat())


def tell(slot: datetime) -> str:
    return warehouse.ask(f"counted {slot:%H:%M}", key=f"{slot.isoformat()} told")


def take_stock(run: Run, slot: datetime) -> str:
    run.step(count, slot)
    run.sleep(2.5 * HOUR)
    return run.step(tell, slot)


skips = flows.flow("stock/skips", schedule=HOUR, overlap="skip")(take_stock)
waits = flows.flow("stock/waits", schedule=HOUR, overlap="wait", catch_up="all")(take_stock)
allows = flows.flow("stock/allows", schedule=HOUR, overlap="allow")(take_stock)
