"""How long to wait before the next try. Pure: randomness is an argument."""

from __future__ import annotations

import random
from collections.abc import Callable


def exponential(attempt: int, *, first: float, cap: float, factor: float = 2.0) -> float:
    """Seconds before try ``attempt + 1`` (attempts count from 1): first, first·factor, … never above ``cap``."""
    return min(cap, first * factor ** min(attempt - 1, 63))


def full_jitter(
    attempt: int,
    *,
    first: float,
    cap: float,
    factor: float = 2.0,
    uniform: Callable[[float, float], float] = random.uniform,
) -> float:
    """A random share of :func:`exponential`, so that a crowd that failed together does not come back together.

    Source of the idea: M. Brooker, "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015).
    """
    return uniform(0.0, exponential(attempt, first=first, cap=cap, factor=factor))
