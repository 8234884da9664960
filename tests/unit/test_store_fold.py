"""What an audit takes for equal."""

from __future__ import annotations

from typing import Any

import pytest

from celery_flows.store import Flow
from celery_flows.store.fold import differing


def results_differ(stored: Any, told: Any) -> bool:
    flow = Flow(controller_id="a", owner_session_key="b", result_json=stored)
    return differing(flow, {"result_json": told}, ["result_json"]) == ["result_json"]


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        (1e23, 10**23),
        (1e16, 10**16),
        (-0.0, 0),
        ({"a": [1.5e300]}, {"a": [15 * 10**299]}),
        (0.1, 0.1),
        ([], []),
        (None, None),
    ],
)
def test_a_number_is_the_same_however_the_database_writes_it(stored: Any, told: Any) -> None:
    assert not results_differ(stored, told)


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        (1e23, 10**23 + 1),
        (10**30, 10**30 + 1),
        (0.1, 0.2),
        (1, "1"),
        ({"a": 1}, {"b": 1}),
        ([1, 2], [2, 1]),
        (None, 0),
        (0.5, 0),
    ],
)
def test_what_is_not_the_same_differs(stored: Any, told: Any) -> None:
    assert results_differ(stored, told)
