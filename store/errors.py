"""What can go wrong, as one tree."""

from __future__ import annotations

from typing import Any
from uuid import UUID


class FlowError(Exception):
    """The root of every error this package raises on purpose.

    ::

        FlowError
        ├── InvalidData             a value was refused before anything was written
        │   └── KeyConflict         an idempotency key came back with other input
        ├── FlowNotFound            no such flow, or it belongs to another owner
        ├── StepNotFound            no such step
        ├── DuplicateFlow           a flow with this id is there already
        ├── DuplicateStep           this flow has a step with this id or run id already
        ├── RevisionMismatch        somebody else changed the flow in between
        ├── IllegalTransition       the lifecycle has no such change of status
        │   ├── AlreadyTerminal     the flow has ended; nothing changes any more
        │   └── CancelPending       cancel was requested; only cancelled may follow
        ├── LeaseLost               another worker has taken over
        ├── StartPending            another open transaction holds this idempotency key
        └── StoreError              the database refused or could not be reached (the driver's error is the cause)
            └── SchemaOutdated      the tables are missing or of another version
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors take other arguments than their message, so without this one cannot be pickled, and Celery answers a
        # client with its nearest ancestor that can.
        return _rebuilt, (type(self), self.args), self.__dict__


def _rebuilt(kind: type[FlowError], args: tuple[Any, ...]) -> FlowError:
    return kind.__new__(kind, *args)


class InvalidData(FlowError):
    """A value was refused before anything was written: ``field`` broke ``rule``."""

    def __init__(self, field: str, rule: str) -> None:
        self.field, self.rule = field, rule
        super().__init__(f"{field}: {rule}")


class KeyConflict(InvalidData):
    """An idempotency key was used again with other input, and its flow has not started anew."""

    def __init__(self, controller_id: str, key: str, flow_id: UUID) -> None:
        self.controller_id, self.key, self.flow_id = controller_id, key, flow_id
        super().__init__(
            "key",
            f"{key!r} already started flow {flow_id} of {controller_id!r} with other input; "
            "use another key or the same input",
        )


class FlowNotFound(FlowError):
    """No such flow, or the caller is not its owner (the two are not told apart)."""

    def __init__(self, flow_id: object) -> None:
        self.flow_id = flow_id
        super().__init__(f"no flow {flow_id}")


class StepNotFound(FlowError):
    """No such step."""

    def __init__(self, step_id: object) -> None:
        self.step_id = step_id
        super().__init__(f"no step {step_id}")


class DuplicateFlow(FlowError):
    """A flow with this id is stored already."""

    def __init__(self, flow_id: UUID) -> None:
        self.flow_id = flow_id
        super().__init__(f"flow {flow_id} is stored already")


class DuplicateStep(FlowError):
    """The flow has a step with this id or this run id already."""

    def __init__(self, flow_id: UUID, run_id: str) -> None:
        self.flow_id, self.run_id = flow_id, run_id
        super().__init__(f"flow {flow_id} has a step with run id {run_id} already")


class RevisionMismatch(FlowError):
    """The flow is no longer at the revision the caller read. Read it again and decide anew."""

    def __init__(self, flow_id: UUID, expected: int, actual: int) -> None:
        self.flow_id, self.expected, self.actual = flow_id, expected, actual
        super().__init__(f"flow {flow_id} is at revision {actual}, not {expected}: read it again")


class IllegalTransition(FlowError):
    """The lifecycle has no change from ``status`` to ``target``."""

    def __init__(self, flow_id: UUID, status: str, target: str, why: str = "") -> None:
        self.flow_id, self.status, self.target = flow_id, status, target
        super().__init__(f"flow {flow_id} is {status} and cannot become {target}{why}")


class AlreadyTerminal(IllegalTransition):
    """The flow has ended; nothing changes any more."""

    def __init__(self, flow_id: UUID, status: str, target: str) -> None:
        super().__init__(flow_id, status, target, ": it has ended")


class CancelPending(IllegalTransition):
    """Cancel was requested; the only status that may follow is cancelled."""

    def __init__(self, flow_id: UUID, status: str, target: str) -> None:
        super().__init__(flow_id, status, target, ": cancel was requested")


class LeaseLost(FlowError):
    """This worker's lease ended and another took the work over, or the flow has ended. Stop; change nothing more."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        super().__init__(f"the lease on {run_id} is lost: another worker took over, or the flow has ended")


class StartPending(FlowError):
    """Another transaction that is still open is starting a flow with this key (None: with one of the keys of many).
    Nothing was written, and the caller's own transaction can go on. Try again when the other has ended."""

    def __init__(self, controller_id: str, key: str | None) -> None:
        self.controller_id, self.key = controller_id, key
        which = "one of these keys" if key is None else f"key {key!r}"
        super().__init__(f"an open transaction is starting {controller_id!r} with {which}: try again when it has ended")


class StoreError(FlowError):
    """The database refused an operation or could not be reached. The driver's own error is ``__cause__``.

    ``is_passing``: it was away or busy, and the same may succeed later; else it refused, and will again.
    """

    def __init__(self, message: str, *, is_passing: bool = False) -> None:
        self.is_passing = is_passing
        super().__init__(message)


class SchemaOutdated(StoreError):
    """The tables are missing, or belong to another version of this package."""

    def __init__(self, found: str | None, wanted: str) -> None:
        self.found, self.wanted = found, wanted
        state = "has no celery-flows tables" if found is None else f"is at schema {found}, this version needs {wanted}"
        super().__init__(f"the database {state}: run `celery -A APP flow migrate`")
