"""Names of steps, as a test writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import Celery


def is_meant(name: str, wanted: str) -> bool:
    """Whether ``wanted`` names this step, task or flow definition; of a task's name the last part is enough."""
    return wanted in (name, name.rpartition(".")[2])


def bodies_tasks(app: Celery, body: Callable[..., Any]) -> list[str]:
    """The names of the tasks that have this body: ``run.step(task.run)`` is a plain step, and is called after its
    function, while a test may know it by the task."""
    inner = getattr(body, "func", body)  # functools.partial
    return [name for name, task in app.tasks.items() if task.run == inner]
