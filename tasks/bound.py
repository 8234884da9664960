"""What is at work here, flow and step, for whoever writes a log line meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from types import TracebackType

NAMES = ("flow", "flow_id", "step", "run_id", "attempt")  # all that may be bound

_bound: ContextVar[Mapping[str, object]] = ContextVar("celery_flows_at_work", default={})  # noqa: B039  # never changed


def at_work() -> Mapping[str, object]:
    """The flow and the step that run here; nothing outside of flows."""
    return _bound.get()


class binding:
    """While these run. Whatever is logged in this context, or in one that is copied from it, tells of them."""

    __slots__ = ("_before", "_names")

    def __init__(self, **names: object) -> None:
        self._names = names

    def __enter__(self) -> None:
        self._before = _bound.get()
        _bound.set({**self._before, **self._names})

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # Set, not reset by token: a flow that is unwound from another task's context may leave in that one.
        _bound.set(self._before)
