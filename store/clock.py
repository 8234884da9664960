"""Time, as far as this process may know it.

The database's clock decides everything that two processes must agree on. A process's own clock is only ever compared
with itself: to know how much of a lease is left.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import partial

from celery_flows.store.errors import InvalidData


def boottime() -> float:
    """Seconds since the machine started, suspended time included; only differences mean anything."""
    return read()


# A laptop that slept must find its lease ended, which CLOCK_MONOTONIC would not tell on Linux.
# The test kit puts its own clock in this place.
read = partial(time.clock_gettime, getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def as_utc(field: str, value: datetime) -> datetime:
    """The same instant in UTC.

    Raises:
        InvalidData: for a naive datetime, or what is none.
    """
    if not isinstance(value, datetime):
        raise InvalidData(field, f"must be a datetime with a time zone, not {type(value).__name__}")
    if value.tzinfo is None or value.utcoffset() is None:
        raise InvalidData(field, "needs a time zone, e.g. datetime.now(UTC)")
    return value.astimezone(UTC)
