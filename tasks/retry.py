"""Retry: whether a step that failed is tried again, and after how long. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

from celery_flows.store.backoff import exponential, full_jitter
from celery_flows.store.errors import InvalidData

Error = type[BaseException]

MAX_FACTOR = 1000.0


class Permanent(Exception):
    """Raised by a step, it is never retried: what failed would fail again. Made to be subclassed."""


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and when a step that raised is tried again. Crashes of workers are counted apart.

    Args:
        max_attempts: how often in all; 1 is no retry.
        initial: before the second attempt.
        factor: by which each further pause grows.
        maximum: the longest pause.
        jitter: a random share of the pause instead of all of it, so that a crowd that failed together does not come
            back together.
        on: the errors that are retried, with their subclasses.
        unless: the errors that are not, though ``on`` names them. :class:`Permanent` is never retried, and neither is
            a result that cannot be JSON.

    Raises:
        InvalidData: naming the argument.
    """

    max_attempts: int = 1
    initial: timedelta = timedelta(seconds=1)
    factor: float = 2.0
    maximum: timedelta = timedelta(minutes=5)
    jitter: bool = True
    on: tuple[Error, ...] = (Exception,)
    unless: tuple[Error, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.max_attempts, bool) or not isinstance(self.max_attempts, int) or self.max_attempts < 1:
            raise InvalidData("retry.max_attempts", "must be a whole number from 1")
        for name in "initial", "maximum":
            pause = getattr(self, name)
            if not isinstance(pause, timedelta) or pause < timedelta(0):
                raise InvalidData(f"retry.{name}", "must be a timedelta, and not negative")
        if not isinstance(self.factor, int | float) or not 1 <= self.factor <= MAX_FACTOR:
            raise InvalidData("retry.factor", f"must be a number from 1 to {MAX_FACTOR:g}")
        if not isinstance(self.jitter, bool):
            raise InvalidData("retry.jitter", "must be True or False")
        for name in "on", "unless":
            given = getattr(self, name)
            errors = given if isinstance(given, tuple) else (given,)
            if not all(isinstance(error, type) and issubclass(error, BaseException) for error in errors):
                raise InvalidData(f"retry.{name}", "must be exception types")
            object.__setattr__(self, name, errors)

    def rule(self) -> RetryRule:
        """The policy as it is stored with a Celery step."""
        return RetryRule(
            self.max_attempts, self.initial.total_seconds(), self.factor, self.maximum.total_seconds(), self.jitter,
            tuple(map(name_of, self.on)), tuple(map(name_of, self.unless)),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RetryRule:
    """A :class:`Retry` in JSON's own types: pauses in seconds, errors by name."""

    max_attempts: int
    initial: float
    factor: float
    maximum: float
    jitter: bool
    on: tuple[str, ...]
    unless: tuple[str, ...]

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """The rule that was stored."""
        return cls(**{**plain, "on": tuple(plain["on"]), "unless": tuple(plain["unless"])})

    def pause_after(self, attempt: int, error: BaseException) -> float | None:
        """Seconds before the next attempt, attempt ``attempt`` (from 1) having failed with this error; None: there is
        none."""
        if attempt >= self.max_attempts or not self._covers(error):
            return None
        pause = full_jitter if self.jitter else exponential
        return pause(attempt, first=self.initial, cap=self.maximum, factor=self.factor)

    def _covers(self, error: BaseException) -> bool:
        if isinstance(error, Permanent | InvalidData):
            return False
        names = {name_of(kind) for kind in type(error).__mro__}
        return not names.isdisjoint(self.on) and names.isdisjoint(self.unless)


def name_of(error: Error) -> str:
    """The name by which an error is known in the store."""
    return f"{error.__module__}.{error.__qualname__}"


NEVER = Retry().rule()
