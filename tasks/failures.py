"""Failures in the store: what is kept of them, and the exceptions that they are raised as again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery_flows.store.errors import FlowError
from celery_flows.tasks.errors import StepFailed, StepLost, StepTimedOut
from celery_flows.tasks.payloads import as_text, describe

ENGINE = "engine"  # in a kept error: its type is one of ours, and not a step's own that is called the same
OURS = {kind.__name__: kind for kind in (StepLost, StepTimedOut)}


def failure_of(step: str, error: Mapping[str, Any] | None) -> StepFailed:
    """The exception that stands for a step's kept failure."""
    told = error or {"type": "unknown", "message": ""}
    kind = OURS.get(told["type"], StepFailed) if told.get(ENGINE) else StepFailed
    return kind(step, told["type"], told["message"], cause_of(told))


def cause_of(error: Mapping[str, Any]) -> StepFailed | None:
    """The failure of the step that a flow with this kept error has failed of; None: it was no step's."""
    cause = error.get("cause")
    return None if cause is None else failure_of(cause["step"], cause)


def is_of_engine(kind: type[FlowError], error: Mapping[str, Any] | None) -> bool:
    """Whether this is kept of a failure of this kind that we say a step has come to."""
    told = error or {}
    return told.get("type") == kind.__name__ and bool(told.get(ENGINE))


def of_engine(kind: type[StepFailed], message: str) -> dict[str, Any]:
    """What is kept of a failure that we say a step has come to."""
    return {"type": kind.__name__, "message": message, ENGINE: True}


def of_attempt(error: BaseException) -> dict[str, Any]:
    """What is kept of what an attempt of a step came to."""
    return of_engine(StepTimedOut, error.message) if isinstance(error, StepTimedOut) else describe(error)


def of_flow(error: BaseException) -> dict[str, Any]:
    """What is kept of what a flow function raised: with the step's failure, if it is one or was raised from one."""
    told = describe(error)
    cause = error if isinstance(error, StepFailed) else error.__cause__
    return {**told, "cause": _of_step(cause)} if isinstance(cause, StepFailed) else told


def _of_step(failed: StepFailed) -> dict[str, Any]:
    # It may be of a flow's own making, and of whatever that liked.
    told: dict[str, Any] = {name: as_text(getattr(failed, name, "")) for name in ("step", "type", "message")}
    if type(failed) in OURS.values():
        told[ENGINE] = True
    cause = getattr(failed, "cause", None)
    return {**told, "cause": _of_step(cause)} if isinstance(cause, StepFailed) else told
