"""What the application holds of a flow it started."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import UUID

from celery_flows.store import Flow, FlowManager, FlowStatus, dispatch, inbox
from celery_flows.store import operations as op
from celery_flows.store.models import new_id
from celery_flows.store.script import Call
from celery_flows.tasks.aio import AsyncTransaction, run
from celery_flows.tasks.errors import FlowCancelled, FlowFailed, ResultTimedOut
from celery_flows.tasks.transaction import Transaction, after_commit, transaction_of

if TYPE_CHECKING:
    from celery_flows.tasks.registry import FlowDefinition
    from celery_flows.tasks.runtime import Runtime

Out = TypeVar("Out")

# A poll overshoots by at most half of what has been waited so far, and costs one look-up by primary key.
FIRST_POLL_SECONDS, POLL_FACTOR, MAX_POLL_SECONDS, PATIENT_POLL_SECONDS, PATIENT_AFTER_SECONDS = (
    0.002,
    1.5,
    0.25,
    1.0,
    30,
)


class FlowHandle(Generic[Out]):
    """A flow's id, and what can be asked of it. Reads the store, never the broker."""

    def __init__(self, runtime: Runtime, flow_id: UUID, definition: FlowDefinition[Any, Out] | None = None) -> None:
        self.id = flow_id
        self._runtime = runtime
        self._definition = definition

    def __repr__(self) -> str:
        return f"FlowHandle({self.id})"

    def get(self) -> Flow:
        """The flow as stored now.

        Raises:
            FlowNotFound: it was never committed, or it was pruned.
        """
        return self._runtime.manager.get(self.id)

    def status(self) -> FlowStatus:
        """The flow's status now."""
        return self.get().status

    def result(self, timeout: float | None = None) -> Out:
        """Waits until the flow has ended and gives its result, validated by the flow function's annotation.

        Args:
            timeout: seconds; None waits for as long as it takes.

        Raises:
            FlowFailed: it failed; says why.
            FlowCancelled: it was cancelled.
            ResultTimedOut: it has not ended in time. The flow goes on.
            FlowNotFound: as :meth:`get`.
        """
        pauses = _pauses(self.id, timeout)
        while not (flow := self.get()).status.is_terminal:
            time.sleep(next(pauses))
        return self._outcome(flow)

    def _outcome(self, flow: Flow) -> Out:
        if flow.status is FlowStatus.CANCELLED:
            raise FlowCancelled(self.id)
        if flow.status is FlowStatus.FAILED:
            error = flow.error_json or {}
            reason = flow.state_json.get("failure", {}).get("reason", "unknown")
            raise FlowFailed(self.id, reason, error.get("type", "unknown"), error.get("message", ""))
        definition = self._definition or self._runtime.registry.get(flow.controller_id)
        result: Out = flow.result_json if definition is None else definition.output.decode("result", flow.result_json)
        return result

    def cancel(self, *, session: Transaction | None = None) -> None:
        """Asks the flow to cancel: sticky. It cleans up first, so ``status()`` may say cancelled only later.

        Raises:
            AlreadyTerminal: it has ended.
            FlowNotFound: as :meth:`get`.
        """
        call(self._runtime, self.id, lambda manager: manager.request_cancel(self.id), session)

    def resume(self, payload: dict[str, Any] | None = None) -> None:
        """Resumes a flow that waits: what it waits for has come, with this payload. A flow that no definition drives
        has the payload merged into its state.

        Raises:
            IllegalTransition: it does not wait.
            FlowNotFound: as :meth:`get`.
        """
        write_id = new_id()
        resumed = Call(inbox.resume_by_hand, (self.id, payload, write_id))
        settled = Call(op.find_locked, (self.id, write_id))
        call(self._runtime, self.id, lambda _: self._runtime.store.attempt(resumed, settled=settled), None)

    # ---- the same, for asyncio ----

    async def aget(self) -> Flow:
        """:meth:`FlowHandle.get`, awaited."""
        return await asyncio.to_thread(self.get)

    async def astatus(self) -> FlowStatus:
        """:meth:`FlowHandle.status`, awaited."""
        return await asyncio.to_thread(self.status)

    async def aresult(self, timeout: float | None = None) -> Out:
        """:meth:`FlowHandle.result`, awaited. No thread waits along."""
        pauses = _pauses(self.id, timeout)
        while not (flow := await self.aget()).status.is_terminal:
            await asyncio.sleep(next(pauses))
        return self._outcome(flow)

    async def acancel(self, *, session: AsyncTransaction | None = None) -> None:
        """:meth:`FlowHandle.cancel`, awaited; ``session`` is an AsyncSession or AsyncConnection."""
        await run(self._runtime, session, self.cancel)

    async def aresume(self, payload: dict[str, Any] | None = None) -> None:
        """:meth:`FlowHandle.resume`, awaited."""
        await asyncio.to_thread(self.resume, payload)


def _pauses(flow_id: UUID, timeout: float | None) -> Iterator[float]:
    """The seconds between two looks.

    Raises:
        ResultTimedOut: by then the time is over.
    """
    began = time.monotonic()
    pause = FIRST_POLL_SECONDS
    while True:
        waited = time.monotonic() - began
        if timeout is not None and waited >= timeout:
            raise ResultTimedOut(flow_id, timeout)
        yield pause if timeout is None else min(pause, timeout - waited)
        longest = MAX_POLL_SECONDS if waited < PATIENT_AFTER_SECONDS else PATIENT_POLL_SECONDS
        pause = min(pause * POLL_FACTOR, longest)


def call(
    runtime: Runtime, flow_id: UUID, change: Callable[[FlowManager], object], transaction: Transaction | None
) -> None:
    """Makes a change that wakes the flow's driver, and tells the broker after the commit."""
    caller = None if transaction is None else transaction_of(transaction)
    manager = runtime.manager if caller is None else FlowManager(runtime.store.using(caller))
    change(manager)
    store = runtime.store if caller is None else runtime.store.using(caller)
    hint = store.run(dispatch.find_hint, str(flow_id))
    if hint is not None and caller is None:
        runtime.publisher.publish(hint)
    elif hint is not None and caller is not None:
        after_commit(caller, lambda: runtime.publisher.publish(hint))
