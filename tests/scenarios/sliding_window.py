"""Many items, of which a few are at work at a time: as Celery tasks, and as child flows that take a while each."""

from __future__ import annotations

from datetime import timedelta

from celery import Celery

from celery_flows import Flows, Run, StepFailed
from tests.scenarios.outside import outside as printer

app = Celery("pictures", set_as_current=False)
flows = Flows(app)

AT_ONCE = 5


@app.task(name="pictures.print", shared=False)
def print_picture(picture: str) -> str:
    return printer.ask(f"print {picture}", key=picture)


@flows.flow("pictures/print all")
def print_all(run: Run, pictures: list[str]) -> list[str]:
    """Gives those that were not printed."""
    outcomes = run.gather([print_picture.s(each) for each in pictures], limit=AT_ONCE, return_exceptions=True)
    return [each for each, outcome in zip(pictures, outcomes, strict=True) if isinstance(outcome, StepFailed)]


@flows.flow("pictures/frame")
def frame(run: Run, picture: str) -> str:
    printed = run.step(print_picture.run, picture)
    run.sleep(timedelta(hours=1))  # the ink dries
    return f"{printed}, dry"


@flows.flow("pictures/frame all")
def frame_all(run: Run, pictures: list[str]) -> list[str]:
    return run.gather([frame.s(each) for each in pictures], limit=AT_ONCE)
