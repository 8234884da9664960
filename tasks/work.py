"""What a flow function may hand over to be run; and what to write in place of what it may not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias, TypeGuard

from celery import Signature, Task

from celery_flows.store.errors import InvalidData
from celery_flows.tasks.awaited import Awaited
from celery_flows.tasks.children import ChildFlow
from celery_flows.tasks.members import Remote
from celery_flows.tasks.partials import innermost
from celery_flows.tasks.start_async import AsyncStarts

Work: TypeAlias = Remote | Callable[[], Any]


def is_remote(work: Work) -> TypeGuard[Remote]:
    """Whether it runs, or is waited for, elsewhere: a Celery task or a flow of its own."""
    return isinstance(work, Signature | ChildFlow | Awaited)


def check_function(what: str, work: Any) -> None:
    """Says nothing if it can run here as a step.

    Raises:
        InvalidData: it cannot; says what to write.
    """
    if isinstance(work, AsyncStarts | ChildFlow):
        raise InvalidData(what, "takes no flow; write run.flow(definition, input)")
    if isinstance(work, Awaited):
        raise InvalidData(what, f"takes no {type(work).__name__}; write run.wait_for, run.approval or run.sleep")
    if isinstance(work, Task | Signature):
        raise InvalidData(what, "takes a function, not a Celery task")
    takes = "a function" if what == "transaction" else "a function or a Celery task"
    _check_runs_here(what, work, takes, "give the function and its arguments, not what it returns")


def check_member(work: Any) -> None:
    """Says nothing if it can be a member of a gather.

    Raises:
        InvalidData: it cannot; says what to write.
    """
    if isinstance(work, AsyncStarts | Task):
        kind = ("task", "task") if isinstance(work, Task) else ("flow", "definition")
        raise InvalidData("gather", f"takes {kind[0]}.s(…), not a bare {kind[1]}")
    if not is_remote(work):
        takes = "task.s(…), flow.s(…), Event, Decision, Timer and functions without arguments"
        _check_runs_here("gather", work, takes, "for a function with arguments write partial(function, …)")


def check_definition(what: str, definition: Any) -> None:
    """Says nothing if it is a flow's definition.

    Raises:
        InvalidData: it is not; says what to write.
    """
    if not isinstance(definition, AsyncStarts):
        kind = type(definition).__name__
        raise InvalidData(what, f"takes a definition, which @flows.flow(name) makes, and its input; not {kind}")


def _check_runs_here(what: str, work: Any, takes: str, instead: str) -> None:
    if isinstance(innermost(work), Task):
        raise InvalidData(what, "would run this Celery task here, not on its queue; write task.s(…), without partial")
    if not callable(work):
        if inspect.iscoroutine(work):
            work.close()  # nobody will await it
        raise InvalidData(what, f"takes {takes}, not {type(work).__name__}; {instead}")
