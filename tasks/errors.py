"""What a flow function may meet, and what a caller may be told of a flow."""

from __future__ import annotations

from uuid import UUID

from celery_flows.store.errors import FlowError


class StepFailed(FlowError):
    """A step failed for good; raised by the step's call, live and when replayed alike."""

    def __init__(self, step: str, type: str, message: str) -> None:
        self.step, self.type, self.message = step, type, message
        super().__init__(f"step {step} failed with {type}: {message}")


class StepLost(StepFailed):
    """A step killed its worker too often and was given up."""


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


class FlowFailed(FlowError):
    """The flow ended as failed; ``reason`` and the error's type and message say why."""

    def __init__(self, flow_id: UUID, reason: str, type: str, message: str) -> None:
        self.flow_id, self.reason, self.type, self.message = flow_id, reason, type, message
        super().__init__(f"flow {flow_id} failed ({reason}): {type}: {message}")


class ResultTimedOut(FlowError, TimeoutError):
    """The flow had not ended when the caller's patience did. It goes on; ask again."""

    def __init__(self, flow_id: UUID, seconds: float) -> None:
        self.flow_id, self.seconds = flow_id, seconds
        super().__init__(f"flow {flow_id} has not ended within {seconds:g} s; it goes on, ask again")


class UnknownFlow(FlowError):
    """No flow definition of this name is registered."""

    def __init__(self, name: str, known: list[str]) -> None:
        self.name = name
        listed = ", ".join(sorted(known)) or "none"
        super().__init__(f"no flow definition {name!r}; registered are: {listed}")
