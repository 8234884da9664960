"""The public way to change a flow.

Read, decide by a pure transition, write under the revision, try again on conflict.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID

from celery_flows.store import transitions
from celery_flows.store.aio import AsyncFlowStore
from celery_flows.store.backoff import full_jitter
from celery_flows.store.base import FlowStore
from celery_flows.store.errors import FlowNotFound, InvalidData, RevisionMismatch
from celery_flows.store.models import (
    Flow,
    FlowEvent,
    FlowMode,
    FlowStatus,
    FlowStep,
    FlowStepStatus,
    StepRuntime,
)
from celery_flows.store.operations import created_columns
from celery_flows.store.script import Pause
from celery_flows.store.transitions import Transition
from celery_flows.store.validation import encode_json
from celery_flows.store.waits import ExternalEventWait, ManualWait, TimerWait, parse_wait, wait_json

T = TypeVar("T")
AnyWait = TimerWait | ExternalEventWait | ManualWait | Mapping[str, Any]
Decide = Callable[[Flow], Transition | None]

TRIES = 8


@dataclass(frozen=True, slots=True)
class Ask:
    """Call a method of the store."""

    method: str
    args: tuple[Any, ...]


Conversation = Generator[Ask | Pause, Any, T]


def _change(flow_id: UUID, decide: Decide, owner: str | None, tries: int) -> Conversation[Flow]:
    """Optimistic tries with full jitter, then one under the row's lock, so that a crowd of writers all get through."""

    def gated(flow: Flow) -> Transition | None:
        if owner is not None and flow.owner_session_key != owner:
            raise FlowNotFound(flow_id)
        return decide(flow)

    for attempt in range(1, tries):
        flow = yield Ask("get", (flow_id,))
        if flow is None:
            raise FlowNotFound(flow_id)
        transition = gated(flow)
        if transition is None:
            return flow  # type: ignore[no-any-return]
        after = transition.applied_to(flow)
        try:
            stored, _event = yield Ask("update_and_append", (after, transition.kind, transition.told()))
        except RevisionMismatch:
            yield Pause(full_jitter(attempt, first=0.005, cap=0.25))
        else:
            return stored  # type: ignore[no-any-return]
    return (yield Ask("update_locked", (flow_id, gated)))  # type: ignore[no-any-return]


def _observe(step: FlowStep, owner: str | None) -> Conversation[FlowStep]:
    if owner is not None:
        yield from _get(step.flow_id, owner)
    return (yield Ask("upsert_step", (step,)))  # type: ignore[no-any-return]


def _get(flow_id: UUID, owner: str | None) -> Conversation[Flow]:
    flow = yield Ask("get", (flow_id,))
    if flow is None or (owner is not None and flow.owner_session_key != owner):
        raise FlowNotFound(flow_id)
    return flow  # type: ignore[no-any-return]


def _create(flow: Flow) -> Conversation[Flow]:
    yield Ask("insert_and_append", (flow, {"set": created_columns(flow)}))
    return (yield from _get(flow.id, None))


def _new_flow(mode: FlowMode, status: FlowStatus, fields: Mapping[str, Any]) -> Flow:
    return Flow(mode=mode, status=status, **fields)


def _request_cancel(flow: Flow) -> Transition | None:
    return None if flow.cancel_requested and not flow.status.is_terminal else transitions.request_cancel(flow)


def _pause(flow: Flow) -> Transition:
    # This node's clock will do: whether paused_at is set decides, its value is for people.
    return transitions.pause(flow, datetime.now(UTC))


def _waiting(wait: AnyWait) -> Decide:
    stored = wait_json(parse_wait(wait))
    return lambda flow: transitions.set_waiting(flow, stored)


def _check_patch(field: str, value: Mapping[str, Any] | None) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise InvalidData(field, f"must be an object, not {type(value).__name__}")
    encode_json(field, value)


class FlowManager:
    """Changes flows, each change with its event in one transaction.

    Over a store inside the caller's transaction (``store.using(session)``) the row is locked at once instead of tried
    optimistically. Every method on an existing flow takes ``owner_session_key``: another owner's flow is not found.

    Raises (all methods on an existing flow):
        FlowNotFound, AlreadyTerminal, CancelPending, IllegalTransition, InvalidData, StoreError. Nothing was written.
    """

    def __init__(self, store: FlowStore, *, tries: int = TRIES) -> None:
        self.store = store
        self._tries = 1 if getattr(store, "in_transaction", False) else tries

    def _play(self, talk: Conversation[T]) -> T:
        try:
            step = next(talk)
            while True:
                try:
                    answer = self._answer(step)
                except Exception as error:
                    step = talk.throw(error)
                else:
                    step = talk.send(answer)
        except StopIteration as end:
            value: T = end.value
            return value

    def _answer(self, step: Ask | Pause) -> Any:
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        return getattr(self.store, step.method)(*step.args)

    def change(self, flow_id: UUID, decide: Decide, *, owner_session_key: str | None = None) -> Flow:
        """Has ``decide`` say what changes (None: nothing), and writes that. It may be asked several times."""
        return self._play(_change(flow_id, decide, owner_session_key, self._tries))

    def create_managed(self, **fields: Any) -> Flow:
        """Stores a new flow; takes the fields of :class:`Flow` as keywords. Status created."""
        return self._play(_create(_new_flow(FlowMode.MANAGED, FlowStatus.CREATED, fields)))

    def create_mirrored(self, **fields: Any) -> Flow:
        """Stores a flow that mirrors work done elsewhere; it is born running."""
        return self._play(_create(_new_flow(FlowMode.MIRRORED, FlowStatus.RUNNING, fields)))

    def start_running(self, flow_id: UUID, *, owner_session_key: str | None = None) -> Flow:
        """created → running."""
        return self.change(flow_id, transitions.start_running, owner_session_key=owner_session_key)

    def set_waiting(self, flow_id: UUID, wait: AnyWait, *, owner_session_key: str | None = None) -> Flow:
        """running → waiting, for a timer, an external event, or somebody's :meth:`resume`."""
        return self.change(flow_id, _waiting(wait), owner_session_key=owner_session_key)

    def resume(
        self, flow_id: UUID, patch: Mapping[str, Any] | None = None, *, owner_session_key: str | None = None
    ) -> Flow:
        """waiting → running; ``patch`` is merged into the state, shallowly."""
        _check_patch("patch", patch)
        return self.change(flow_id, lambda flow: transitions.resume(flow, patch), owner_session_key=owner_session_key)

    def update_state(
        self,
        flow_id: UUID,
        patch: Mapping[str, Any],
        next_step: str | None = None,
        *,
        owner_session_key: str | None = None,
    ) -> Flow:
        """Merges ``patch`` into the state of an open flow, shallowly; ``next_step`` becomes its current step."""
        _check_patch("patch", patch)
        return self.change(
            flow_id, lambda flow: transitions.update_state(flow, patch, next_step), owner_session_key=owner_session_key
        )

    def finish(
        self, flow_id: UUID, state: Mapping[str, Any] | None = None, *, owner_session_key: str | None = None
    ) -> Flow:
        """running → finished; ``state`` is merged into the state, shallowly."""
        _check_patch("state", state)
        return self.change(flow_id, lambda flow: transitions.finish(flow, state), owner_session_key=owner_session_key)

    def fail(self, flow_id: UUID, reason: str, *, owner_session_key: str | None = None) -> Flow:
        """running or waiting → failed; the reason stands in the state under ``failure.reason``."""
        return self.change(flow_id, lambda flow: transitions.fail(flow, reason), owner_session_key=owner_session_key)

    def request_cancel(self, flow_id: UUID, *, owner_session_key: str | None = None) -> Flow:
        """Asks an open flow to cancel: sticky, and once is enough. Its driver cleans up and makes it cancelled."""
        return self.change(flow_id, _request_cancel, owner_session_key=owner_session_key)

    def cancel(self, flow_id: UUID, *, owner_session_key: str | None = None) -> Flow:
        """Any open status → cancelled, at once and without cleanup."""
        return self.change(flow_id, transitions.cancel, owner_session_key=owner_session_key)

    def pause(self, flow_id: UUID, *, owner_session_key: str | None = None) -> Flow:
        """Keeps workers from driving the flow until :meth:`unpause`, but to cancel it; nothing else changes."""
        return self.change(flow_id, _pause, owner_session_key=owner_session_key)

    def unpause(self, flow_id: UUID, *, owner_session_key: str | None = None) -> Flow:
        """Lets workers drive the flow again."""
        return self.change(flow_id, transitions.unpause, owner_session_key=owner_session_key)

    def record_step_observation(
        self,
        *,
        flow_id: UUID,
        run_id: str,
        task: str,
        status: FlowStepStatus,
        child_session_key: str | None = None,
        result_json: Any = None,
        runtime: StepRuntime = StepRuntime.MIRRORED,
        owner_session_key: str | None = None,
    ) -> FlowStep:
        """Inserts or brings forward the step with this run id; a late observation never reopens a closed step, and a
        missing ``child_session_key`` keeps the old one."""
        step = FlowStep(
            flow_id=flow_id, run_id=run_id, task=task, status=status, child_session_key=child_session_key,
            result_json=result_json, runtime=runtime,
        )  # fmt: skip
        return self._play(_observe(step, owner_session_key))

    def get(self, flow_id: UUID, *, owner_session_key: str | None = None) -> Flow:
        """Gives the flow."""
        return self._play(_get(flow_id, owner_session_key))

    def list_by_owner(self, owner_session_key: str, limit: int | None = 100, after: Flow | None = None) -> list[Flow]:
        """As :meth:`FlowStore.list_by_owner`."""
        return self.store.list_by_owner(owner_session_key, limit, after)

    def list_by_status(self, status: FlowStatus, limit: int | None = 100, after: Flow | None = None) -> list[Flow]:
        """As :meth:`FlowStore.list_by_status`."""
        return self.store.list_by_status(status, limit, after)

    def list_steps(self, flow_id: UUID, *, owner_session_key: str | None = None) -> list[FlowStep]:
        """A flow's steps, oldest first."""
        self.get(flow_id, owner_session_key=owner_session_key)
        return self.store.list_steps(flow_id)

    def list_events(
        self, flow_id: UUID, limit: int | None = 100, *, owner_session_key: str | None = None
    ) -> list[FlowEvent]:
        """A flow's events, newest first."""
        self.get(flow_id, owner_session_key=owner_session_key)
        return self.store.list_events(flow_id, limit)


class AsyncFlowManager:
    """:class:`FlowManager`, awaited: the same names, arguments, answers and errors."""

    def __init__(self, store: AsyncFlowStore, *, tries: int = TRIES) -> None:
        self.store = store
        self._tries = 1 if store.in_transaction else tries

    async def _play(self, talk: Conversation[T]) -> T:
        try:
            step = next(talk)
            while True:
                try:
                    answer = await self._answer(step)
                except Exception as error:
                    step = talk.throw(error)
                else:
                    step = talk.send(answer)
        except StopIteration as end:
            value: T = end.value
            return value

    async def _answer(self, step: Ask | Pause) -> Any:
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        return await getattr(self.store, step.method)(*step.args)

    async def change(self, flow_id: UUID, decide: Decide, *, owner_session_key: str | None = None) -> Flow:
        return await self._play(_change(flow_id, decide, owner_session_key, self._tries))

    async def create_managed(self, **fields: Any) -> Flow:
        return await self._play(_create(_new_flow(FlowMode.MANAGED, FlowStatus.CREATED, fields)))

    async def create_mirrored(self, **fields: Any) -> Flow:
        return await self._play(_create(_new_flow(FlowMode.MIRRORED, FlowStatus.RUNNING, fields)))

    async def start_running(self, flow_id: UUID, *, owner_session_key: str | None = None) -> Flow:
        return await self.change(flow_id, transitions.start_running, owner_session_key=owner_session_key)

    async def set_waiting(self, flow_id: UUID, wait: AnyWait, *, owner_session_key: str | None = None) -> Flow:
        return await self.change(flow_id, _waiting(wait), owner_session_key=owner_session_key)

    async def resume(
        self, flow_id: UUID, patch: Mapping[str, Any] | None = None, *, owner_session_key: str | None = None
    ) -> Flow:
        _check_patch("patch", patch)
        return await self.change(
            flow_id, lambda flow: transitions.resume(flow, patch), owner_session_key=owner_session_key
        )

    async def update_state(
        self,
        flow_id: UUID,
        patch: Mapping[str, Any],
        next_step: str | None = None,
        *,
        owner_session_key: str | None = None,
    ) -> Flow:
        _check_patch("patch", patch)
        return await self.change(
            flow_id, lambda flow: transitions.update_state(flow, patch, next_step), owner_session_key=owner_session_key
        )

    async def finish(
        self, flow_id: UUID, state: Mapping[str, Any] | None = None, *, owner_session_key: str | None = None
    ) -> Flow:
        _check_patch("state", state)
        return await self.change(
            flow_id, lambda flow: transitions.finish(flow, state), owner_session_key=owner_session_key
        )

    async def fail(self, flow_id: UUID, reason: str, *, owner_session_key: str | None = None) -> Flow:
        return await self.change(
            flow_id, lambda flow: transitions.fail(flow, reason), owner_session_key=owner_session_key
        )

    async def request_cancel(self, flow_id: UUID, *, owner_session_key: str | None = None) -> Flow:
        return await self.change(flow_id, _request_cancel, owner_session_key=owner_session_key)

    async def cancel(self, flow_id: UUID, *, owner_session_key: str | None = None) -> Flow:
        return await self.change(flow_id, transitions.cancel, owner_session_key=owner_session_key)

    async def pause(self, flow_id: UUID, *, owner_session_key: str | None = None) -> Flow:
        return await self.change(flow_id, _pause, owner_session_key=owner_session_key)

    async def unpause(self, flow_id: UUID, *, owner_session_key: str | None = None) -> Flow:
        return await self.change(flow_id, transitions.unpause, owner_session_key=owner_session_key)

    async def record_step_observation(
        self,
        *,
        flow_id: UUID,
        run_id: str,
        task: str,
        status: FlowStepStatus,
        child_session_key: str | None = None,
        result_json: Any = None,
        runtime: StepRuntime = StepRuntime.MIRRORED,
        owner_session_key: str | None = None,
    ) -> FlowStep:
        step = FlowStep(
            flow_id=flow_id, run_id=run_id, task=task, status=status, child_session_key=child_session_key,
            result_json=result_json, runtime=runtime,
        )  # fmt: skip
        return await self._play(_observe(step, owner_session_key))

    async def get(self, flow_id: UUID, *, owner_session_key: str | None = None) -> Flow:
        return await self._play(_get(flow_id, owner_session_key))

    async def list_by_owner(
        self, owner_session_key: str, limit: int | None = 100, after: Flow | None = None
    ) -> list[Flow]:
        return await self.store.list_by_owner(owner_session_key, limit, after)

    async def list_by_status(
        self, status: FlowStatus, limit: int | None = 100, after: Flow | None = None
    ) -> list[Flow]:
        return await self.store.list_by_status(status, limit, after)

    async def list_steps(self, flow_id: UUID, *, owner_session_key: str | None = None) -> list[FlowStep]:
        await self.get(flow_id, owner_session_key=owner_session_key)
        return await self.store.list_steps(flow_id)

    async def list_events(
        self, flow_id: UUID, limit: int | None = 100, *, owner_session_key: str | None = None
    ) -> list[FlowEvent]:
        await self.get(flow_id, owner_session_key=owner_session_key)
        return await self.store.list_events(flow_id, limit)
