"""Records to test with, valid unless a test says otherwise."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from celery_flows.store import Flow, FlowStatus, FlowStep

DAY = timedelta(days=1)
NAMES = {"controller_id": "orders/fulfil", "owner_session_key": "tenant:acme"}

# What JSON, or PostgreSQL's jsonb, cannot hold.
UNSTORABLE: dict[str, dict[str, Any]] = {
    "NaN": {"x": float("nan")},
    "infinity": {"x": [float("inf")]},
    "bytes": {"x": b"raw"},
    "set": {"x": {1, 2}},
    "datetime": {"x": datetime(2030, 1, 1, tzinfo=UTC)},
    "NUL": {"x": "a\0b"},
    "NUL in a key": {"a\0b": 1},
    "lone surrogate": {"x": "\ud800"},
    "key that is no string": {"x": {1: "a"}},
    "too large": {"x": "a" * (1024 * 1024)},
}


def now() -> datetime:
    """This process's clock."""
    return datetime.now(UTC)


def a_flow(**fields: Any) -> Flow:
    """A new flow."""
    return Flow(**{**NAMES, **fields})


def ended(days_ago: float, status: FlowStatus = FlowStatus.FINISHED, **fields: Any) -> Flow:
    """A flow that became terminal so many days ago."""
    at = now() - days_ago * DAY
    return a_flow(status=status, created_at=at, updated_at=at, **fields)


def a_step(flow_id: UUID, run_id: str = "run-1", **fields: Any) -> FlowStep:
    """A new step."""
    return FlowStep(**{"flow_id": flow_id, "run_id": run_id, "task": "charge", **fields})
