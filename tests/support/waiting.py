"""Waiting for facts, never for time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import sqlalchemy as sa

T = TypeVar("T")


def until(look: Callable[[], T], what: str, *, within_seconds: float = 10.0) -> T:
    """What ``look`` gives once it is true; fails, saying ``what`` did not happen, when the time is over."""
    deadline = time.monotonic() + within_seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {within_seconds} s: {what}"
        time.sleep(0.005)
    return found


def waits_for_lock(engine: sa.Engine) -> int | None:
    """The process id of a session of this PostgreSQL database that waits for a lock, if there is one."""
    blocked = sa.text(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' LIMIT 1"
    )
    with engine.connect() as connection:
        found: int | None = connection.scalar(blocked)
        return found


def other_sessions(engine: sa.Engine) -> int:
    """How many more sessions this PostgreSQL database has."""
    others = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with engine.connect() as connection:
        return int(connection.scalar(others) or 0)
