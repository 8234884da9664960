"""A trip is booked whole, or not at all."""

from __future__ import annotations

from celery import Celery

from celery_flows import Flows, Retry, Run
from tests.scenarios.outside import outside as agencies

app = Celery("trips", set_as_current=False)
flows = Flows(app)


def book(what: str, booking: str) -> str:
    return agencies.ask(f"book {what}", key=f"{booking} book")


def cancel(what: str, booking: str) -> None:
    agencies.ask(f"cancel {what}", key=f"{booking} cancel")


@flows.flow("trips/book", retry=Retry(max_attempts=2))
def book_trip(run: Run, parts: list[str]) -> list[str]:
    booked = []
    for part in parts:
        booking = str(run.uuid())
        run.options(name=f"cancel {part}").on_failure(cancel, part, booking)  # before: who refuses may have booked
        booked.append(run.options(name=f"book {part}").step(book, part, booking))
    return booked
