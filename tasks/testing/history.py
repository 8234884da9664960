"""A flow's history as a test reads it: one line an event."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from datetime import datetime
from types import EllipsisType
from typing import Any

from celery_flows.store import FlowStep, InvalidData
from celery_flows.tasks.handle import FlowHandle
from celery_flows.tasks.testing.names import is_meant

Expected = Sequence["str | EllipsisType"]


def history(handle: FlowHandle[Any]) -> list[str]:
    """The kinds of the flow's events, oldest first, with the step's name where there is one: ``step_failed charge``."""
    store = handle._runtime.store
    names = {step.run_id: step.task for step in store.list_steps(handle.id)}
    events = store.list_events(handle.id, None)[::-1]
    return [_line(event.kind, names.get(event.payload_json.get("run_id", ""))) for event in events]


def assert_history(handle: FlowHandle[Any], expected: Expected) -> None:
    """The flow's history is this one; ``...`` stands for any number of events. Shows both, line by line, if it is not.

    Raises:
        AssertionError
    """
    __tracebackhide__ = True  # pytest shows the test's own line
    actual = history(handle)
    if not _fits(actual, _parts(expected)):
        lines = ["..." if line is ... else line for line in expected]
        compared = "\n".join(difflib.ndiff([str(line) for line in lines], actual))
        raise AssertionError(f"the history of flow {handle.id} is another (- expected, + is there):\n{compared}")


def most_at_once(handle: FlowHandle[Any], name: str) -> int:
    """The most of the flow's steps of this name that were out at once: a gather keeps them to its ``limit=``. They are
    Celery tasks or child flows, each out from being scheduled until it has ended.

    Raises:
        InvalidData: no step has this name.
    """
    steps = handle._runtime.store.list_steps(handle.id)
    members = [step for step in steps if is_meant(step.task, name)]
    if not members:
        there = ", ".join(dict.fromkeys(step.task for step in steps)) or "none"
        raise InvalidData("most_at_once", f"the flow has had no step {name!r}; its steps are {there}")
    return max(sum(_is_out(member, each.created_at) for member in members) for each in members)


def _is_out(member: FlowStep, at: datetime) -> bool:
    return member.created_at <= at and (not member.status.is_terminal or at < member.updated_at)


def _line(kind: str, step: str | None) -> str:
    return kind if step is None else f"{kind} {step}"


def _parts(expected: Expected) -> list[list[str]]:
    """What stands between the dots."""
    parts: list[list[str]] = [[]]
    for line in expected:
        if isinstance(line, str):
            parts[-1].append(line)
        else:
            parts.append([])
    return parts


def _fits(actual: list[str], parts: list[list[str]]) -> bool:
    first, *others = parts
    if not others:
        return actual == first
    *between, last = others
    if len(actual) < len(first) + len(last) or actual[: len(first)] != first:
        return False
    left = actual[len(first) : len(actual) - len(last)]
    if actual[len(actual) - len(last) :] != last:
        return False
    for part in between:
        begin = next((n for n in range(len(left) - len(part) + 1) if left[n : n + len(part)] == part), None)
        if begin is None:
            return False
        left = left[begin + len(part) :]
    return True
