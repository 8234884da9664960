"""What stands in for Celery tasks and child flows where a flow function is called without a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from celery_flows.store import InvalidData
from celery_flows.tasks.runtime import Runtime
from celery_flows.tasks.testing.asked import meant
from celery_flows.tasks.testing.names import is_meant


class Stubs:
    """Functions by the names of the tasks and flow definitions that they stand in for."""

    def __init__(self, steps: Mapping[str, Callable[..., Any]]) -> None:
        self._steps = steps
        self._found: set[str] = set()

    def find(self, name: str) -> Callable[..., Any] | None:
        """What stands in for this task or flow definition."""
        for given, work in self._steps.items():
            if is_meant(name, given):
                self._found.add(given)
                return work
        return None

    def check(self, runtime: Runtime) -> None:
        """Says nothing if each is for something: what it was meant to stand in for has been called in earnest.

        Raises:
            InvalidData: one was not called, and the application has nothing of its name.
        """
        there = [*runtime.app.tasks, *(definition.name for definition in runtime.registry)]
        for given in self._steps:
            if given not in self._found and not any(is_meant(name, given) for name in there):
                told = f"{given!r}{meant(given, there)} is no Celery task or flow definition, and nothing called it"
                raise InvalidData("steps", f"{told}; plain functions are yours to patch")
