"""What a flow function may meet, and what a caller may be told of a flow."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from celery_flows.store.errors import FlowError


class StepFailed(FlowError):
    """A step failed for good; raised by the step's call, live and when replayed alike. ``type`` and ``message`` say of
    what. ``cause`` is for a step that is a child flow: the failure of the child's own step, if that is what the child
    failed of; the exception's ``__cause__``, too."""

    def __init__(self, step: str, type: str, message: str, cause: StepFailed | None = None) -> None:
        self.step, self.type, self.message, self.cause = step, type, message, cause
        super().__init__(f"step {step} failed with {type}: {message}")
        if cause is not None:
            self.__cause__ = cause


class StepLost(StepFailed):
    """A step killed its worker too often and was given up."""


class StepTimedOut(StepFailed):
    """A step took longer than it may."""


class WaitTimedOut(FlowError):
    """The external event did not come in time."""

    def __init__(self, topic: str, correlation_id: str) -> None:
        self.topic, self.correlation_id = topic, correlation_id
        super().__init__(f"no event {topic!r} for {correlation_id!r} came in time")


class FlowCancelled(FlowError):
    """The flow was cancelled. In a flow function: raised once, by the first step that is not recorded yet; steps taken
    after it are cleanup. From ``FlowHandle.result()``: the flow ended as cancelled."""

    def __init__(self, flow_id: UUID) -> None:
        self.flow_id = flow_id
        super().__init__(f"flow {flow_id} was cancelled")


class FlowTimedOut(FlowError):
    """The flow's deadline has passed. In a flow function: raised once, by the first step that is not recorded yet;
    steps taken after it are cleanup, and the flow fails whatever the function does."""

    def __init__(self, flow_id: UUID, deadline_at: datetime) -> None:
        self.flow_id, self.deadline_at = flow_id, deadline_at
        super().__init__(f"flow {flow_id} has not ended by its deadline, {deadline_at:%Y-%m-%d %H:%M:%S} UTC")


class HistoryMismatch(FlowError):
    """The flow function came to another step than the one that history has in that place, or to a wait for another
    correlation id: it is not the function by which the flow began, or does not do the same each time. The flow is
    left alone until a worker has one that fits."""

    def __init__(self, expected: str, found: str, position: int) -> None:
        self.expected, self.found, self.position = expected, found, position
        super().__init__(f"step {position} of the history is {expected!r}, but the flow function came to {found!r}")


class FlowFailed(FlowError):
    """The flow ended as failed; ``reason`` and the error's type and message say why, ``undo_failed`` which of its undo
    steps failed too. ``cause`` is the failure of the step that the flow function raised, or raised its own error from;
    the exception's ``__cause__``, too."""

    def __init__(
        self,
        flow_id: UUID,
        reason: str,
        type: str,
        message: str,
        undo_failed: Sequence[str] = (),
        cause: StepFailed | None = None,
    ) -> None:
        self.flow_id, self.reason, self.type, self.message = flow_id, reason, type, message
        self.undo_failed, self.cause = tuple(undo_failed), cause
        undone = f"; not undone: {', '.join(undo_failed)}" if undo_failed else ""
        super().__init__(f"flow {flow_id} failed ({reason}): {type}: {message}{undone}")
        if cause is not None:
            self.__cause__ = cause


class ResultTimedOut(FlowError, TimeoutError):
    """The flow had not ended when the caller's patience did. It goes on; ask again."""

    def __init__(self, flow_id: UUID, seconds: float) -> None:
        self.flow_id, self.seconds = flow_id, seconds
        super().__init__(f"flow {flow_id} has not ended within {seconds:g} s; it goes on, ask again")


class UnknownFlow(FlowError):
    """No flow definition of this name, or not in this version, is registered."""

    def __init__(self, name: str, known: list[str], version: int | None = None) -> None:
        self.name, self.version = name, version
        listed = ", ".join(sorted(known)) or "none"
        wanted = repr(name) if version is None else f"{name!r} of version {version}"
        super().__init__(f"no flow definition {wanted}; registered are: {listed}")
