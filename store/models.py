"""The records: what the store hands out and takes in. Frozen; times are aware UTC; ids are UUIDs of version 7."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Self
from uuid import UUID

import uuid_utils.compat
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from celery_flows.store.clock import as_utc
from celery_flows.store.errors import InvalidData
from celery_flows.store.validation import check_name, check_text, encode_json
from celery_flows.store.waits import parse_wait


def new_id() -> UUID:
    """A UUID of version 7: its order is (nearly) the order of creation, so indexes grow at one end."""
    return uuid_utils.compat.uuid7()


def parse_id(field: str, value: Any) -> UUID:
    """A flow's id, of whatever says it.

    Raises:
        InvalidData: it is none.
    """
    try:
        return value if isinstance(value, UUID) else UUID(value)
    except (ValueError, TypeError, AttributeError):
        raise InvalidData(field, "is no flow id (a UUID)") from None


class FlowStatus(StrEnum):
    CREATED = "created"
    RUNNING = "running"
    WAITING = "waiting"
    CANCELLED = "cancelled"
    FINISHED = "finished"
    FAILED = "failed"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL


OPEN = frozenset({FlowStatus.CREATED, FlowStatus.RUNNING, FlowStatus.WAITING})
TERMINAL = frozenset(FlowStatus) - OPEN


class FlowStepStatus(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self not in OPEN_STEP


OPEN_STEP = frozenset({FlowStepStatus.PENDING, FlowStepStatus.RUNNING})


class StepRuntime(StrEnum):
    MANAGED = "managed"
    MIRRORED = "mirrored"


class FlowMode(StrEnum):
    MANAGED = "managed"
    MIRRORED = "mirrored"


class Record(BaseModel):
    """A frozen row. Bad fields raise :class:`InvalidData`; rows read back are not validated again (:meth:`of_row`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_as_flow_error(cls, value: Any, build: Callable[[Any], Self]) -> Self:
        try:
            return build(value)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or cls.__name__
            raise InvalidData(field, first["msg"]) from None

    @classmethod
    def of_row(cls, row: Mapping[Any, Any]) -> Self:
        """The record of a row of our own tables; columns that are not fields are left out."""
        values = dict(row)  # SQLAlchemy's rows are slow to be asked for one name after the other
        fields = {name: values[name] for name in cls.model_fields if name in values}
        return cls.model_construct(**fields)  # type: ignore[return-value]

    def but(self, **changes: Any) -> Self:
        """The same record with some fields changed, validated."""
        return type(self)(**{**dict(self), **changes})


class Flow(Record):
    """One durable run of a flow definition: a row of ``flows``."""

    id: UUID = Field(default_factory=new_id)
    controller_id: str  # names the flow definition
    goal: str = ""  # for people
    owner_session_key: str  # whose flow it is; the owner gate compares it
    requester_origin: str | None = None  # where the request came from
    current_step: str | None = None
    state_json: dict[str, Any] = Field(default_factory=dict)
    wait_json: dict[str, Any] | None = None  # see waits.py; set while status is waiting
    status: FlowStatus = FlowStatus.CREATED
    cancel_requested: bool = False  # sticky
    revision: int = Field(default=1, ge=1)  # grows by 1 with each change
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    updated_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    mode: FlowMode = FlowMode.MANAGED
    input_json: Any = None
    result_json: Any = None
    error_json: dict[str, Any] | None = None  # {"type", "message"}: why it failed, or, while open, does not go on
    idempotency_key: str | None = None  # unique within controller_id
    definition_version: int = Field(default=1, ge=1)
    parent_flow_id: UUID | None = None
    deadline_at: datetime | None = None
    paused_at: datetime | None = None  # while set, no worker drives the flow, but to cancel it
    retain_seconds: int | None = Field(default=None, ge=0)  # how long it is kept after its end; None: as is set
    finished_at: datetime | None = None  # set with every terminal status
    continued_as: UUID | None = None  # the flow that goes on for this one, with a fresh history
    forked_from: UUID | None = None  # the flow whose first steps this one has taken over
    trace_json: dict[str, str] | None = None  # W3C trace context: what its runs are children of

    @field_validator("controller_id", "owner_session_key")
    @classmethod
    def _names(cls, value: str, info: Any) -> str:
        return check_name(info.field_name, value)

    @field_validator("requester_origin", "current_step", "idempotency_key")
    @classmethod
    def _optional_names(cls, value: str | None, info: Any) -> str | None:
        return value if value is None else check_name(info.field_name, value)

    @field_validator("goal")
    @classmethod
    def _text(cls, value: str, info: Any) -> str:
        return check_text(info.field_name, value)

    @field_validator("state_json", "error_json", "input_json", "result_json")
    @classmethod
    def _json(cls, value: Any, info: Any) -> Any:
        encode_json(info.field_name, value)
        return value

    @field_validator("wait_json")
    @classmethod
    def _wait(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            parse_wait(value)
        return value

    @field_validator("created_at", "updated_at", "deadline_at", "paused_at", "finished_at")
    @classmethod
    def _times(cls, value: datetime | None, info: Any) -> datetime | None:
        return value if value is None else as_utc(info.field_name, value)


class FlowStep(Record):
    """A unit of work with a recorded result: a row of ``flow_steps``."""

    id: UUID = Field(default_factory=new_id)
    flow_id: UUID
    runtime: StepRuntime = StepRuntime.MANAGED
    child_session_key: str | None = None
    run_id: str  # stable over crashes and retries: the Celery task id, the idempotency key
    task: str  # the step's name; for a Celery step the task's
    status: FlowStepStatus = FlowStepStatus.PENDING
    result_json: Any = None
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    updated_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    position: int = 0  # the how-manieth step of its flow, from 1; 0 for an observed one
    attempt: int = Field(default=1, ge=1)  # crashes do not count, retries do
    args_json: Any = None  # what a Celery step is called with, what a wait waits for
    error_json: dict[str, Any] | None = None  # {"type", "message"}, when failed

    @field_validator("run_id", "task")
    @classmethod
    def _names(cls, value: str, info: Any) -> str:
        return check_name(info.field_name, value)

    @field_validator("child_session_key")
    @classmethod
    def _optional_names(cls, value: str | None, info: Any) -> str | None:
        return value if value is None else check_name(info.field_name, value)

    @field_validator("result_json", "args_json", "error_json")
    @classmethod
    def _json(cls, value: Any, info: Any) -> Any:
        encode_json(info.field_name, value)
        return value

    @field_validator("created_at", "updated_at")
    @classmethod
    def _times(cls, value: datetime, info: Any) -> datetime:
        return as_utc(info.field_name, value)


class FlowEvent(Record):
    """An appended fact: a row of ``flow_events``. Kinds are past tense; the list is open."""

    id: int  # grows
    flow_id: UUID
    kind: str
    payload_json: dict[str, Any]
    at: datetime
    revision: int | None = None  # of the flow, when the event changed its row
