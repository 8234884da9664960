"""Options of steps: beside, not among, their arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, TypeVar

from celery import Task
from celery.local import Proxy

from celery_flows.store.errors import InvalidData
from celery_flows.store.validation import check_name
from celery_flows.tasks.retry import Retry

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class StepOptions:
    """What can be said of a step; None: not said.

    Raises:
        InvalidData: naming the option.
    """

    name: str | None = None
    retry: Retry | None = None
    timeout: timedelta | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        for name in "name", "key":
            if getattr(self, name) is not None:
                check_name(f"step {name}", getattr(self, name))
        if self.retry is not None:
            check_retry("step retry", self.retry)
        if self.timeout is not None:
            check_duration("step timeout", self.timeout)

    @property
    def seconds(self) -> float | None:
        """How long one attempt may take."""
        return None if self.timeout is None else self.timeout.total_seconds()

    def over(self, others: StepOptions) -> StepOptions:
        """These, and what they do not say, by the others."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        return StepOptions(**{name: getattr(others, name) if value is None else value for name, value in said.items()})


def step(*, name: str | None = None, retry: Retry | None = None, timeout: timedelta | None = None) -> Callable[[F], F]:
    """Options of a function as a step, wherever it is one; ``run.options(…)`` goes before them.

    Args:
        name: what the step is called; the function's own name by default. The name is the step's identity in histories
            that are there.
        retry: how often and when it is tried again.
        timeout: how long one attempt may take.

    It goes below ``@app.task``, next to the function.

    Raises:
        InvalidData: naming the option; or this is no function of yours.
    """
    options = StepOptions(name, retry, timeout)

    def decorated(function: F) -> F:
        # A task is not asked what it is before it must be: it would be made, with the settings there are by now.
        if issubclass(type(function), Proxy) or isinstance(function, Task):
            raise InvalidData("step", "is for the function: write @step(…) below @app.task")
        if not callable(function):
            raise InvalidData("step", f"is for a function, not {type(function).__name__}")
        try:
            function.__flow_step__ = options  # type: ignore[attr-defined]
        except (AttributeError, TypeError):
            raise InvalidData("step", "is for a function of yours; for this one write run.options(…)") from None
        return function

    return decorated


def options_of(function: Any) -> StepOptions:
    """The options that :func:`step` gave a function."""
    found = getattr(getattr(function, "func", function), "__flow_step__", None)  # functools.partial
    return found if isinstance(found, StepOptions) else StepOptions()


def check_retry(field: str, value: Any) -> Retry:
    """``value``, if it says when to try again.

    Raises:
        InvalidData: it does not.
    """
    if not isinstance(value, Retry):
        raise InvalidData(field, "must be a Retry(…)")
    return value


def check_duration(field: str, value: Any) -> timedelta:
    """A length of time.

    Raises:
        InvalidData: it is none, or not longer than nothing.
    """
    if not isinstance(value, timedelta) or value <= timedelta(0):
        raise InvalidData(field, "must be a timedelta, and longer than nothing")
    return value
