"""The apps of a user, for the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

from celery_flows import FlowManager

SHOP = """
from celery import Celery
from datetime import timedelta

from celery_flows import Flows, Retry, Run

app = Celery("shop")
flows = Flows(app)


@flows.flow("shop/hello")
def hello(run: Run) -> str:
    return "hello"


@flows.flow("shop/double")
def double(run: Run, number: int) -> int:
    return run.step(twice, number)


def twice(number: int) -> int:
    return 2 * number


@flows.flow("shop/fail")
def fail(run: Run) -> None:
    raise RuntimeError("no more boxes")


@flows.flow("shop/print", retry=Retry(max_attempts=2, initial=timedelta(0)))
def print_(run: Run) -> None:
    run.step(jam)


def jam() -> None:
    raise RuntimeError("no paper")


@flows.flow("shop/wait")
def wait(run: Run, order: str) -> str:
    return run.wait_for("approval", order)["by"]


@flows.flow("shop/ask")
def ask(run: Run) -> str:
    said = run.approval("ship")
    return f"{'yes' if said.granted else 'no'} by {said.by}: {said.comment}"
"""
# An app whose Flows is made in a module that only a worker would import.
LATE = 'from celery import Celery\n\napp = Celery("late", include=["late_flows"])\n'
LATE_FLOWS = """
from celery_flows import Flows, Run
from late import app

flows = Flows(app)


@flows.flow("late/hello")
def hello(run: Run) -> str:
    return "hello"
"""
PLAIN = 'from celery import Celery\n\napp = Celery("plain")\n'
MISSET = 'from celery import Celery\n\napp = Celery("misset")\napp.conf.flow_sweep_secs = 3\n'
MODULES = {"shop": SHOP, "late": LATE, "late_flows": LATE_FLOWS, "plain": PLAIN, "misset": MISSET}


def write_modules(folder: Path) -> Path:
    """A folder with the apps above."""
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def a_flow(manager: FlowManager, controller_id: str = "orders/import", owner: str = "ada", **more: Any) -> UUID:
    """A flow that no definition drives, running."""
    made = manager.create_managed(controller_id=controller_id, goal="", owner_session_key=owner, **more)
    return manager.start_running(made.id).id
