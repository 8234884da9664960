"""Limits of a flow definition, as written beside its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from celery_flows.store.errors import InvalidData
from celery_flows.store.limits import Bounds
from celery_flows.store.validation import check_name
from celery_flows.tasks.options import check_duration

SHORTEST = timedelta(seconds=1)  # of the times within which so many may begin
MOST_STARTS = 1000  # the times of the last so many are kept with the limit


@dataclass(frozen=True, slots=True)
class Limit:
    """How many flows of a definition may be at work, or begin within some time. It counts in the store, so it holds for
    all workers together.

    - ``Limit(3)``: three at once;
    - ``Limit(3, per=lambda order: order.tenant)``: three of each tenant;
    - ``Limit(100, every=timedelta(minutes=1))``: a hundred begin within any minute;
    - ``Limit(100, every=timedelta(minutes=1), at_once=3)``: and no more than three are at work at once.

    Args:
        count: how many.
        every: the time within which so many may begin; without it, so many may be at work at once.
        at_once: how many may be at work at once, besides.
        per: takes the flow's input, as the flow function would, and gives the text or whole number that it shares the
            limit with. It is called once, where the flow is started. None: all flows of the definition share it.

    Raises:
        InvalidData: naming what is wrong.
    """

    count: int
    every: timedelta | None = None
    at_once: int | None = None
    per: Callable[[Any], str | int] | None = None

    def __post_init__(self) -> None:
        for field, value in ("limit", self.count), ("limit at_once", self.at_once):
            if value is not None and (type(value) is not int or value < 1):
                raise InvalidData(field, "must be a whole number from 1")
        if self.every is None and self.at_once is not None:
            raise InvalidData("limit at_once", "goes with every=; alone it is Limit(3)")
        if self.every is not None:
            if check_duration("limit every", self.every) < SHORTEST:
                raise InvalidData("limit every", "must be a second or more")
            if self.count > MOST_STARTS:
                raise InvalidData(
                    "limit", f"is {self.count} within a time; {MOST_STARTS} are allowed: take a shorter one"
                )
        if self.per is not None and not callable(self.per):
            raise InvalidData("limit per", "must be a function of the flow's input")

    @property
    def bounds(self) -> Bounds:
        """What the store counts by."""
        if self.every is None:
            return Bounds(at_once=self.count)
        return Bounds(self.at_once, self.count, self.every.total_seconds())

    def key(self, definition: str, input: Any) -> str:
        """What a flow of this definition, with this input, shares the limit with.

        Raises:
            InvalidData: ``per`` gives none, or raises.
        """
        if self.per is None:
            return json.dumps([definition], ensure_ascii=False)
        try:
            value: Any = self.per(input)
        except Exception as error:
            raise InvalidData("limit per", f"raised {type(error).__name__} for this input") from error
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise InvalidData("limit per", f"must give text or a whole number, not {type(value).__name__}")
        return json.dumps([definition, value if type(value) is int else check_name("limit per", str(value))],
                          ensure_ascii=False)  # fmt: skip
