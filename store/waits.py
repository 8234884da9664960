"""Wait conditions: what a waiting flow waits for, as stored in ``wait_json``."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_serializer, field_validator

from celery_flows.store.clock import as_utc
from celery_flows.store.errors import InvalidData
from celery_flows.store.validation import check_name


class _Wait(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str | None = None  # the driven flow's wait step, which is closed with the payload


class TimerWait(_Wait):
    """Until ``at``, by the database's clock; a time that has passed is due at once."""

    kind: Literal["timer"] = "timer"
    at: datetime

    @field_validator("at")
    @classmethod
    def _aware(cls, value: datetime) -> datetime:
        return as_utc("wait.at", value)

    @field_serializer("at")
    def _iso(self, value: datetime) -> str:
        return value.isoformat()


class ExternalEventWait(_Wait):
    """Until an external event of this topic and correlation id comes, or ``timeout_at`` passes."""

    kind: Literal["external_event"] = "external_event"
    topic: str
    correlation_id: str
    timeout_at: datetime | None = None

    @field_validator("topic", "correlation_id")
    @classmethod
    def _names(cls, value: str, info: Any) -> str:
        return check_name(f"wait.{info.field_name}", value)

    @field_validator("timeout_at")
    @classmethod
    def _aware(cls, value: datetime | None) -> datetime | None:
        return value if value is None else as_utc("wait.timeout_at", value)

    @field_serializer("timeout_at")
    def _iso(self, value: datetime | None) -> str | None:
        return None if value is None else value.isoformat()


class ManualWait(_Wait):
    """Until somebody resumes the flow."""

    kind: Literal["manual"] = "manual"


Wait = Annotated[TimerWait | ExternalEventWait | ManualWait, Field(discriminator="kind")]
_WAIT: TypeAdapter[TimerWait | ExternalEventWait | ManualWait] = TypeAdapter(Wait)


def parse_wait(
    wait: TimerWait | ExternalEventWait | ManualWait | Mapping[str, Any],
) -> TimerWait | ExternalEventWait | ManualWait:
    """The wait condition that a model or a dict describes.

    Raises:
        InvalidData: for an unknown kind, a missing, empty or superfluous field, a naive time.
    """
    try:
        return _WAIT.validate_python(dict(wait) if isinstance(wait, Mapping) else wait)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise InvalidData(".".join(["wait", *map(str, first["loc"])]), first["msg"]) from None


def wait_json(wait: TimerWait | ExternalEventWait | ManualWait) -> dict[str, Any]:
    """The stored form: JSON, without what is not set."""
    return wait.model_dump(mode="json", exclude_none=True)


def due_at(wait: Mapping[str, Any] | None) -> datetime | None:
    """When a stored wait ends by itself, if ever."""
    if wait is None:
        return None
    text = wait.get("at") or wait.get("timeout_at")
    return None if text is None else datetime.fromisoformat(text)


def event_key(topic: str, correlation_id: str) -> str:
    """What events and their waiters are matched by; the length keeps ("a", "bc") and ("ab", "c") apart."""
    return f"{len(topic)}:{topic}:{correlation_id}"


def wait_key(wait: Mapping[str, Any] | None) -> str | None:
    """The :func:`event_key` of a stored wait for an external event, else None."""
    if wait is None or wait.get("kind") != "external_event":
        return None
    return event_key(wait["topic"], wait["correlation_id"])
