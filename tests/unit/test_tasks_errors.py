"""What users are told: what went wrong and what to do, with ids as attributes and no payload in the text."""

from __future__ import annotations

import inspect
from uuid import UUID

import pytest

from celery_flows import (
    FlowCancelled,
    FlowError,
    FlowFailed,
    ResultTimedOut,
    StepFailed,
    StepLost,
    UnknownFlow,
    WaitTimedOut,
)
from celery_flows.tasks import errors
from celery_flows.tasks.replay import Suspended

FLOW = UUID(int=7)


def test_every_error_is_a_flow_error_with_a_docstring() -> None:
    found = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)]
    assert len(found) >= 7
    assert all(issubclass(error, FlowError) and error.__doc__ for error in found)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (StepFailed("charge", "ValueError", "sold out"), "step charge failed with ValueError: sold out"),
        (WaitTimedOut("approval", "o-1"), "no event 'approval' for 'o-1' came in time"),
        (FlowCancelled(FLOW), f"flow {FLOW} was cancelled"),
        (FlowFailed(FLOW, "lost", "DriverLost", "died"), f"flow {FLOW} failed (lost): DriverLost: died"),
        (ResultTimedOut(FLOW, 2.5), f"flow {FLOW} has not ended within 2.5 s; it goes on, ask again"),
        (UnknownFlow("x", ["b", "a"]), "no flow definition 'x'; registered are: a, b"),
    ],
)
def test_messages_say_what_happened(error: FlowError, said: str) -> None:
    assert str(error) == said


def test_ids_are_attributes() -> None:
    assert FlowFailed(FLOW, "r", "t", "m").flow_id == FlowCancelled(FLOW).flow_id == FLOW
    assert (StepLost("s", "t", "m").step, StepLost("s", "t", "m").type) == ("s", "t")


def test_a_lost_step_is_a_failed_step_and_patience_a_timeout() -> None:
    assert issubclass(StepLost, StepFailed)
    assert issubclass(ResultTimedOut, TimeoutError)


def test_unwinding_passes_a_flows_own_handlers() -> None:
    assert not issubclass(Suspended, Exception)
