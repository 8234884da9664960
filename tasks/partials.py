"""Functions that come with some of their arguments."""

from __future__ import annotations

from functools import partial
from typing import Any


def innermost(work: Any) -> Any:
    """What a ``functools.partial``, of others perhaps, calls in the end; anything else is that itself."""
    while isinstance(work, partial):
        work = work.func
    return work
