"""Whatever validation accepts, each database stores, and gives back as the same JSON."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from celery_flows.store import FlowStepStatus
from tests.support.samples import NAMES
from tests.support.shells import Shell

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=10
)


def same(stored: Any, given: Any) -> bool:
    """Equality, as far as jsonb keeps it: its numbers are decimal, so 1e23 comes back as an integer."""
    if isinstance(given, float):
        return isinstance(stored, int | float) and math.isclose(stored, given, rel_tol=1e-15, abs_tol=0)
    if isinstance(given, list):
        return isinstance(stored, list) and len(stored) == len(given) and all(map(same, stored, given))
    if isinstance(given, dict):
        return (
            isinstance(stored, dict) and stored.keys() == given.keys() and all(same(stored[k], given[k]) for k in given)
        )
    return type(stored) is type(given) and bool(stored == given)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=anything)
@example(value=None)
@example(value=[1e23, 1e308, 5e-324, -0.0, 2**80])
@example(value={"": {"\\u0000": "\\", "\u2028": '"'}})
@example(value={"a": "x" * 100_000})
def test_json_comes_back_as_it_was_given(open_shell: Shell, value: Any) -> None:
    manager, store = open_shell.manager, open_shell.store
    flow = manager.create_managed(**NAMES, input_json=value, state_json={"value": value})
    assert same(flow.input_json, value)
    assert same(flow.state_json, {"value": value})
    changed = manager.update_state(flow.id, {"again": value})
    assert same(changed.state_json, {"value": value, "again": value})
    event = store.append_event(flow.id, "noted", {"value": value})
    assert same(event.payload_json, {"value": value})
    step = manager.record_step_observation(
        flow_id=flow.id, run_id="r", task="t", status=FlowStepStatus.SUCCEEDED, result_json=value
    )
    assert same(step.result_json, value)
    assert same(manager.list_steps(flow.id)[0].result_json, value)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=texts.filter(lambda text: bool(text.strip())))
def test_names_come_back_as_they_were_given(open_shell: Shell, name: str) -> None:
    flow = open_shell.manager.create_managed(controller_id=name, owner_session_key=name, goal=name)
    assert (flow.controller_id, flow.owner_session_key, flow.goal) == (name, name, name)
    assert flow.id in [listed.id for listed in open_shell.manager.list_by_owner(name)]
