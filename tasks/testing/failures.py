"""What flows failed of, with the application's lines that led there: a flow's history keeps type and message only."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from uuid import UUID

OURS = "celery_flows."


def tell_failure(flow_id: UUID, error: BaseException) -> str:
    """The error and its causes, the first cause first, each with the application's own lines."""
    told = [f"flow {flow_id} failed:\n"]
    for each in reversed(list(_causes(error))):
        told += _own_lines(each).format()
        told += traceback.format_exception_only(each)
    return "".join(told)


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _own_lines(error: BaseException) -> traceback.StackSummary:
    frames = traceback.walk_tb(error.__traceback__)
    own = ((frame, line) for frame, line in frames if not frame.f_globals.get("__name__", "").startswith(OURS))
    return traceback.StackSummary.extract(own)
