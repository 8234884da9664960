"""The lifecycle, every status against every transition, with and without a requested cancel."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_flows.store import AlreadyTerminal, CancelPending, Flow, FlowStatus, IllegalTransition, transitions
from celery_flows.store.models import OPEN, TERMINAL
from celery_flows.store.transitions import NEXT, Transition
from tests.support.samples import a_flow, now

S = FlowStatus
MANUAL = {"kind": "manual"}

CALLS: dict[str, Callable[[Flow], Transition]] = {
    "start_running": transitions.start_running,
    "set_waiting": lambda flow: transitions.set_waiting(flow, MANUAL),
    "resume": transitions.resume,
    "update_state": lambda flow: transitions.update_state(flow, {"a": 1}),
    "finish": transitions.finish,
    "fail": lambda flow: transitions.fail(flow, "why"),
    "request_cancel": transitions.request_cancel,
    "cancel": transitions.cancel,
    "pause": lambda flow: transitions.pause(flow, now()),
    "unpause": transitions.unpause,
}
# What each allows: from these statuses, to this one (None: the status stays), and whether after a requested cancel too.
ALLOWED: dict[str, tuple[set[FlowStatus], FlowStatus | None, bool]] = {
    "start_running": ({S.CREATED}, S.RUNNING, False),
    "set_waiting": ({S.RUNNING}, S.WAITING, False),
    "resume": ({S.WAITING}, S.RUNNING, False),
    "update_state": (set(OPEN), None, True),
    "finish": ({S.RUNNING}, S.FINISHED, False),
    "fail": ({S.RUNNING, S.WAITING}, S.FAILED, False),
    "request_cancel": (set(OPEN), None, True),
    "cancel": (set(OPEN), S.CANCELLED, True),
    "pause": (set(OPEN), None, True),
    "unpause": (set(OPEN), None, True),
}


@pytest.mark.parametrize(("name", "status", "cancel"), list(product(CALLS, FlowStatus, [False, True])))
def test_every_transition_from_every_status(name: str, status: FlowStatus, cancel: bool) -> None:
    flow = a_flow(status=status, cancel_requested=cancel, wait_json=MANUAL if status is S.WAITING else None)
    froms, target, despite_cancel = ALLOWED[name]
    if status in TERMINAL:
        expected: type[Exception] | None = AlreadyTerminal
    elif cancel and not despite_cancel:
        expected = CancelPending
    else:
        expected = None if status in froms else IllegalTransition
    if expected is not None:
        with pytest.raises(expected) as caught:
            CALLS[name](flow)
        assert type(caught.value) is expected
        return
    after = CALLS[name](flow).applied_to(flow)
    assert after.status is (target or status)
    assert after.cancel_requested is (cancel or name in ("request_cancel", "cancel"))
    assert (after.wait_json is not None) is (after.status is S.WAITING)


def test_the_table_says_the_same_as_the_functions() -> None:
    moves = {(status, target) for froms, target, _ in ALLOWED.values() if target for status in froms}
    assert {(status, target) for status, targets in NEXT.items() for target in targets} == moves
    assert NEXT.keys() == set(FlowStatus)


def test_terminal_means_nothing_may_follow() -> None:
    assert {status for status in FlowStatus if not NEXT[status]} == TERMINAL
    assert {status for status in FlowStatus if status.is_terminal} == TERMINAL


def test_a_transition_tells_the_columns_it_sets_as_json() -> None:
    at = now()
    told = transitions.pause(a_flow(), at).told()
    assert told == {"set": {"paused_at": at.isoformat()}}
    assert transitions.fail(a_flow(status=S.RUNNING), "why").told()["reason"] == "why"


states = st.dictionaries(st.text(max_size=3), st.none() | st.integers(), max_size=4)


@given(states, states)
def test_a_merge_is_shallow_and_leaves_its_arguments(state: dict[str, object], patch: dict[str, object]) -> None:
    before = dict(state), dict(patch)
    merged = transitions.merged(state, patch)
    assert merged == {key: patch.get(key, state.get(key)) for key in state.keys() | patch.keys()}
    assert (state, patch) == before
    assert transitions.merged(state, None) == state


def test_a_failure_keeps_what_is_known_of_it() -> None:
    flow = a_flow(status=S.RUNNING, state_json={"failure": {"hint": "h"}})
    assert transitions.fail(flow, "why").columns["state_json"] == {"failure": {"hint": "h", "reason": "why"}}
    flow = a_flow(status=S.RUNNING, state_json={"failure": ["not", "ours"]})
    assert transitions.fail(flow, "why").columns["state_json"] == {"failure": {"reason": "why"}}
