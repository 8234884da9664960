"""Pauses: they grow, and never past their cap."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from celery_flows.store.backoff import exponential, full_jitter

attempts = st.integers(1, 10_000)
seconds = st.floats(0.001, 3600)


def test_pauses_double_up_to_the_cap() -> None:
    assert [exponential(n, first=1, cap=5) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 5, 5]
    assert [exponential(n, first=1, cap=100, factor=3) for n in (1, 2, 3)] == [1, 3, 9]


@given(attempts, seconds, seconds)
def test_a_pause_is_within_its_bounds_and_never_shrinks(attempt: int, first: float, cap: float) -> None:
    pause = exponential(attempt, first=first, cap=cap)
    assert min(first, cap) <= pause <= cap
    assert pause <= exponential(attempt + 1, first=first, cap=cap)


@given(attempts, seconds, seconds)
def test_jitter_takes_a_share_between_nothing_and_all(attempt: int, first: float, cap: float) -> None:
    whole = exponential(attempt, first=first, cap=cap)
    assert 0 <= full_jitter(attempt, first=first, cap=cap) <= whole
    assert full_jitter(attempt, first=first, cap=cap, uniform=lambda low, high: high) == whole
    assert full_jitter(attempt, first=first, cap=cap, uniform=lambda low, high: low) == 0
