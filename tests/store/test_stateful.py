"""The manager and the store held against a model in memory, whatever the order of calls and whoever writes besides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from celery_flows.store import (
    AlreadyTerminal,
    CancelPending,
    Flow,
    FlowError,
    FlowEvent,
    FlowManager,
    FlowNotFound,
    FlowStatus,
    FlowStepStatus,
    IllegalTransition,
    RevisionMismatch,
    SqlFlowStore,
)
from celery_flows.store.engines import make_engine
from tests.support.fold import assert_whole

SETTINGS = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
OWNERS = ("tenant:acme", "tenant:other")
TERMINAL = ("finished", "failed", "cancelled")
OPEN_STEP = ("pending", "running")

owners = st.sampled_from(OWNERS)
patches = st.dictionaries(st.sampled_from("abc"), st.none() | st.integers() | st.text("xyü", max_size=3), max_size=2)


@dataclass(frozen=True)
class Model:
    """What we know of a flow, without any of the store's code."""

    owner: str
    status: str = "created"
    cancel: bool = False
    state: dict[str, Any] = field(default_factory=dict)
    step: str | None = None
    wait: dict[str, Any] | None = None
    paused: bool = False
    revision: int = 1

    def refused(self, method: str) -> type[FlowError] | None:
        """The error that a method owes in this status, None if it may go ahead."""
        if self.status in TERMINAL:
            return AlreadyTerminal
        legal_in = {
            "start_running": ("created",), "set_waiting": ("running",), "resume": ("waiting",),
            "finish": ("running",), "fail": ("running", "waiting"),
        }  # fmt: skip
        if method not in legal_in:
            return None
        if self.cancel:
            return CancelPending
        return None if self.status in legal_in[method] else IllegalTransition


class Lifecycle(RuleBasedStateMachine):
    """Every method of the manager, in any order, over a few flows."""

    url: str  # set by the test

    def __init__(self) -> None:
        super().__init__()
        self.store = SqlFlowStore(make_engine(self.url))
        self.manager = FlowManager(self.store)
        self.models: dict[UUID, Model] = {}
        self.steps: dict[tuple[UUID, str], dict[str, Any]] = {}
        self.read: dict[UUID, Flow] = {}  # what a slow writer read, some time ago

    flows = Bundle("flows")

    @initialize(target=flows, owner=owners)
    def first(self, owner: str) -> UUID:
        return self.create(owner, {})

    @rule(target=flows, owner=owners, state=patches)
    def another(self, owner: str, state: dict[str, Any]) -> UUID:
        return self.create(owner, state)

    def create(self, owner: str, state: dict[str, Any]) -> UUID:
        flow = self.manager.create_managed(controller_id="c", owner_session_key=owner, state_json=state)
        self.models[flow.id] = Model(owner, state=dict(state))
        self.read[flow.id] = flow
        self.matches(flow)
        return flow.id

    def change(self, flow_id: UUID, owner: str, method: str, *args: Any, **becomes: Any) -> None:
        model = self.models[flow_id]
        call: Callable[..., Flow] = getattr(self.manager, method)
        wrong_owner = FlowNotFound if owner != model.owner else None
        if refused := wrong_owner or model.refused(method):
            with pytest.raises(refused):
                call(flow_id, *args, owner_session_key=owner)
            return
        self.models[flow_id] = replace(model, revision=model.revision + 1, **becomes)
        self.matches(call(flow_id, *args, owner_session_key=owner))
        for (of, _), known in self.steps.items():  # an end closes the steps that are open
            if of == flow_id and becomes.get("status") in TERMINAL and known["status"] in OPEN_STEP:
                known["status"] = "cancelled"

    @rule(flow_id=flows, owner=owners)
    def start_running(self, flow_id: UUID, owner: str) -> None:
        self.change(flow_id, owner, "start_running", status="running")

    @rule(flow_id=flows, owner=owners)
    def set_waiting(self, flow_id: UUID, owner: str) -> None:
        wait = {"kind": "external_event", "topic": "t", "correlation_id": "c"}
        self.change(flow_id, owner, "set_waiting", wait, status="waiting", wait=wait)

    @rule(flow_id=flows, owner=owners, patch=patches)
    def resume(self, flow_id: UUID, owner: str, patch: dict[str, Any]) -> None:
        state = {**self.models[flow_id].state, **patch}
        self.change(flow_id, owner, "resume", patch, status="running", wait=None, state=state)

    @rule(flow_id=flows, owner=owners, patch=patches, step=st.none() | st.sampled_from(["s", "t"]))
    def update_state(self, flow_id: UUID, owner: str, patch: dict[str, Any], step: str | None) -> None:
        model = self.models[flow_id]
        becomes = {"state": {**model.state, **patch}, "step": step or model.step}
        self.change(flow_id, owner, "update_state", patch, step, **becomes)

    @rule(flow_id=flows, owner=owners, patch=patches)
    def finish(self, flow_id: UUID, owner: str, patch: dict[str, Any]) -> None:
        state = {**self.models[flow_id].state, **patch}
        self.change(flow_id, owner, "finish", patch, status="finished", state=state)

    @rule(flow_id=flows, owner=owners)
    def fail(self, flow_id: UUID, owner: str) -> None:
        state = {**self.models[flow_id].state, "failure": {"reason": "why"}}
        self.change(flow_id, owner, "fail", "why", status="failed", wait=None, state=state)

    @rule(flow_id=flows, owner=owners)
    def request_cancel(self, flow_id: UUID, owner: str) -> None:
        model = self.models[flow_id]
        if owner == model.owner and model.cancel and model.status not in TERMINAL:
            self.matches(self.manager.request_cancel(flow_id, owner_session_key=owner))  # once is enough
        else:
            self.change(flow_id, owner, "request_cancel", cancel=True)

    @rule(flow_id=flows, owner=owners)
    def cancel(self, flow_id: UUID, owner: str) -> None:
        self.change(flow_id, owner, "cancel", status="cancelled", cancel=True, wait=None)

    @rule(flow_id=flows, owner=owners, on=st.booleans())
    def pause(self, flow_id: UUID, owner: str, on: bool) -> None:
        self.change(flow_id, owner, "pause" if on else "unpause", paused=on)

    @rule(
        flow_id=flows,
        run_id=st.sampled_from("rs"),
        status=st.sampled_from(FlowStepStatus),
        key=st.none() | st.sampled_from("kl"),
        result=st.none() | st.integers(),
    )
    def observe(self, flow_id: UUID, run_id: str, status: FlowStepStatus, key: str | None, result: Any) -> None:
        seen: dict[str, Any] = {
            "flow_id": flow_id,
            "run_id": run_id,
            "task": "t",
            "child_session_key": key,
            "result_json": result,
        }
        ended = self.models[flow_id].status in TERMINAL
        if ended and (flow_id, run_id) not in self.steps and not status.is_terminal:
            with pytest.raises(AlreadyTerminal):
                self.manager.record_step_observation(**seen, status=status)
            return
        known = self.steps.setdefault((flow_id, run_id), {"status": "pending", "key": None, "result": None})
        if known["status"] in OPEN_STEP:
            known["status"] = status.value
            known["key"] = known["key"] if key is None else key
            known["result"] = known["result"] if result is None else result
        step = self.manager.record_step_observation(**seen, status=status)
        assert {"status": step.status.value, "key": step.child_session_key, "result": step.result_json} == known

    @rule(flow_id=flows)
    def slow_writer_reads(self, flow_id: UUID) -> None:
        self.read[flow_id] = self.manager.get(flow_id)

    @rule(flow_id=flows)
    def slow_writer_writes(self, flow_id: UUID) -> None:
        record, model = self.read[flow_id], self.models[flow_id]
        told = {"set": {"goal": record.goal}}
        if record.revision != model.revision:
            with pytest.raises(RevisionMismatch) as caught:
                self.store.update_and_append(record, "touched", told)
            assert (caught.value.expected, caught.value.actual) == (record.revision, model.revision)
        else:
            self.models[flow_id] = replace(model, revision=model.revision + 1)
            self.matches(self.store.update_and_append(record, "touched", told)[0])

    def matches(self, flow: Flow) -> None:
        model = self.models[flow.id]
        assert (flow.status, flow.cancel_requested, flow.state_json) == (model.status, model.cancel, model.state)
        assert (flow.current_step, flow.wait_json, flow.revision) == (model.step, model.wait, model.revision)
        assert (flow.paused_at is not None, flow.finished_at is not None) == (model.paused, model.status in TERMINAL)

    def teardown(self) -> None:
        try:
            for flow_id in self.models:
                assert_whole(self.store, flow_id)
                self.matches(self.manager.get(flow_id))
                steps = {step.run_id: step.status.value for step in self.store.list_steps(flow_id)}
                assert steps == {run_id: known["status"] for (of, run_id), known in self.steps.items() if of == flow_id}
            for status in FlowStatus:
                listed = {flow.id for flow in self.store.list_by_status(status, None)} & self.models.keys()
                assert listed == {flow_id for flow_id, model in self.models.items() if model.status == status}
        finally:
            self.store.close()


class Intruded(SqlFlowStore):
    """A store that lets somebody else write between a manager's read and its write."""

    intrude: Callable[[UUID], None]

    def update_and_append(self, flow: Flow, event_kind: str, event_payload: dict[str, Any]) -> tuple[Flow, FlowEvent]:
        self.intrude(flow.id)
        return super().update_and_append(flow, event_kind, event_payload)


class Interleaved(RuleBasedStateMachine):
    """Two managers that write in between each other's read and write."""

    url: str  # set by the test

    @initialize()
    def begin(self) -> None:
        self.other = FlowManager(SqlFlowStore(make_engine(self.url)))
        store = Intruded(make_engine(self.url))
        store.intrude = self.intrude
        self.manager = FlowManager(store, tries=4)
        self.flow_id = self.manager.create_managed(controller_id="c", owner_session_key="o").id
        self.intruders = 0
        self.ends = False
        self.writes = 0
        self.ended: str | None = None
        self.manager.start_running(self.flow_id)

    def intrude(self, flow_id: UUID) -> None:
        if self.intruders and self.ended is None:
            self.intruders -= 1
            if self.ends:
                self.other.cancel(flow_id)
                self.ended = "cancelled"
            else:
                self.other.update_state(flow_id, {"other": self.intruders})
                self.writes += 1

    @rule(intruders=st.integers(0, 5))
    def write(self, intruders: int) -> None:
        self.intruders = intruders
        try:
            self.manager.update_state(self.flow_id, {f"mine-{self.writes}": intruders})
        except AlreadyTerminal:
            assert self.ended
        else:
            self.writes += 1
            assert self.ended is None

    @rule(intruders=st.integers(0, 1), finishes=st.booleans())
    def end(self, intruders: int, finishes: bool) -> None:
        self.intruders, self.ends = intruders, True
        before = self.ended
        try:
            self.manager.finish(self.flow_id) if finishes else self.manager.fail(self.flow_id, "why")
        except AlreadyTerminal:
            assert self.ended
        else:
            assert before is None
            assert self.ended is None
            self.ended = "finished" if finishes else "failed"

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        store = self.manager.store
        assert isinstance(store, SqlFlowStore)
        try:
            events = assert_whole(store, self.flow_id)
            kinds = [event.kind for event in events]
            assert kinds.count("state_updated") == self.writes
            assert [kind for kind in kinds if kind in TERMINAL] == ([self.ended] if self.ended else [])
        finally:
            store.close()
            assert isinstance(self.other.store, SqlFlowStore)
            self.other.store.close()


def test_any_order_of_calls_agrees_with_the_model(database_url: str) -> None:
    machine = type("LifecycleHere", (Lifecycle,), {"url": database_url})
    run_state_machine_as_test(machine, settings=SETTINGS)


def test_whoever_writes_in_between_no_write_is_lost_or_doubled(database_url: str) -> None:
    machine = type("InterleavedHere", (Interleaved,), {"url": database_url})
    run_state_machine_as_test(machine, settings=settings(SETTINGS, max_examples=12, stateful_step_count=8))
