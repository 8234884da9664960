"""What a test asks to happen, and what it says if it is written wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from celery_flows.store import InvalidData


def check_name(where: str, given: object) -> None:
    """Says nothing to a name.

    Raises:
        InvalidData: it is a function, a task or a flow definition; names its own name.
    """
    if not isinstance(given, str):
        own = getattr(given, "name", None) or getattr(given, "__name__", None)
        raise InvalidData(where, f"takes a name{'' if own is None else f', {own!r}'}, not a {type(given).__name__}")


def check_times(where: str, times: object) -> None:
    """Says nothing to a number of times.

    Raises:
        InvalidData: it is none.
    """
    if type(times) is not int or times < 1:
        raise InvalidData(where, f"times is a whole number from 1, not {times!r}")


def meant(given: str | None, names: Iterable[str]) -> str:
    """Which of the names was meant, to be said after ``given``; nothing if it is one of them, or like none."""
    known = {part: name for name in names for part in (name, name.rpartition(".")[2])}
    near = [] if given is None or given in known else difflib.get_close_matches(given, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
