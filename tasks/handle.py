"""What the application holds of a flow it started."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import UUID

from celery_flows.store import Flow, FlowManager, FlowStatus, dispatch, inbox
from celery_flows.store import operations as op
from celery_flows.store.models import new_id
from celery_flows.store.script import Call
from celery_flows.store.transitions import check_open
from celery_flows.store.validation import check_name
from celery_flows.tasks import going_back
from celery_flows.tasks.aio import AsyncTransaction, run
from celery_flows.tasks.approval import Approval, approval_key
from celery_flows.tasks.emit import emit
from celery_flows.tasks.errors import FlowCancelled, FlowFailed, ResultTimedOut
from celery_flows.tasks.polling import apoll
from celery_flows.tasks.transaction import Transaction, once_committed, transaction_of

if TYPE_CHECKING:
    from celery_flows.tasks.registry import FlowDefinition
    from celery_flows.tasks.runtime import Runtime

Out = TypeVar("Out")


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

    def state(self) -> dict[str, Any]:
        """What the flow has told of itself until now, by ``run.update(…)``.

        Raises:
            FlowNotFound: as :meth:`get`.
        """
        return self.get().state_json

    def result(self, timeout: float | None = None) -> Out:
        """Waits until the flow has ended and gives its result, validated by the flow function's annotation. One that
        goes on as another (``run.restart_as``) ends when that one does.

        Args:
            timeout: seconds; None waits for as long as it takes.

        Raises:
            FlowFailed: it failed; says why.
            FlowCancelled: it was cancelled.
            ResultTimedOut: it has not ended in time. The flow goes on.
            FlowNotFound: as :meth:`get`.
        """
        return self._outcome(self._runtime.wait_until(self._look(), timeout), timeout)

    def _outcome(self, flow: Flow | None, timeout: float | None) -> Out:
        if flow is None:
            assert timeout is not None
            raise ResultTimedOut(self.id, timeout)
        if flow.status is FlowStatus.CANCELLED:
            raise FlowCancelled(flow.id)
        if flow.status is FlowStatus.FAILED:
            error = flow.error_json or {}
            reason = flow.state_json.get("failure", {}).get("reason", "unknown")
            undo_failed = error.get("undo_failed", ())
            raise FlowFailed(flow.id, reason, error.get("type", "unknown"), error.get("message", ""), undo_failed)
        definition = self._runtime.registry.get(flow.controller_id, flow.definition_version) or self._definition
        result: Out = flow.result_json if definition is None else definition.output.decode("result", flow.result_json)
        return result

    def _look(self) -> Callable[[], Flow | None]:
        """Looks whether the flow has ended, or the one that goes on for it has."""
        flow_id = self.id

        def look() -> Flow | None:
            nonlocal flow_id
            while (flow := self._runtime.manager.get(flow_id)).continued_as is not None:
                flow_id = flow.continued_as
            return flow if flow.status.is_terminal else None

        return look

    def cancel(self, *, session: Transaction | None = None) -> None:
        """Asks the flow to cancel, paused or not: sticky. It cleans up first, so ``status()`` may say cancelled only
        later.

        Raises:
            AlreadyTerminal: it has ended.
            FlowNotFound: as :meth:`get`.
        """
        call(self._runtime, self.id, lambda manager: manager.request_cancel(self.id), session)

    def pause(self, *, session: Transaction | None = None) -> None:
        """Keeps workers from going on with the flow after the step in hand; its timers and deadline wait, too. Steps
        that are out on queues are run. A cancel comes first.

        Raises:
            AlreadyTerminal: it has ended.
            FlowNotFound: as :meth:`get`.
        """
        call(self._runtime, self.id, lambda manager: manager.pause(self.id), session)

    def unpause(self, *, session: Transaction | None = None) -> None:
        """Lets workers go on with the flow.

        Raises:
            AlreadyTerminal: it has ended.
            FlowNotFound: as :meth:`get`.
        """
        call(self._runtime, self.id, lambda manager: manager.unpause(self.id), session)

    def approve(self, name: str, *, by: str, comment: str = "", session: Transaction | None = None) -> None:
        """Grants what the flow asks for by ``run.approval(name)``, or will ask for: an approval that comes early is
        kept, and each answers one question: a second one the next of this name. With ``session`` it is part of your
        transaction.

        Raises:
            InvalidData: a name is empty or too long.
            AlreadyTerminal: the flow has ended.
            FlowNotFound: as :meth:`get`.
        """
        self._decide(name, True, by, comment, session)

    def reject(self, name: str, *, by: str, comment: str = "", session: Transaction | None = None) -> None:
        """Refuses what the flow asks for by ``run.approval(name)``; as :meth:`approve`."""
        self._decide(name, False, by, comment, session)

    def _decide(self, name: str, granted: bool, by: str, comment: str, session: Transaction | None) -> None:
        topic, correlation_id = approval_key(self.id, name)
        check_name("by", by)
        store = self._runtime.store if session is None else self._runtime.store.using(transaction_of(session))
        check_open(FlowManager(store).get(self.id), "approved")
        decided = Approval(granted=granted, by=by, at=store.run(op.now), comment=comment)
        emit(self._runtime, topic, correlation_id, decided.model_dump(mode="json"), session)

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

    # ---- going back: a new flow that begins with what this one has recorded ----

    def retry(self, *, session: Transaction | None = None) -> FlowHandle[Out]:
        """Starts a new flow that goes on where this one failed or was cancelled: with its definition and version,
        input, goal and owner, the steps that succeeded, and the failures that it handled. Steps that ended it, or were
        open, run again under new run ids. This flow stays as it is. With ``session`` it is part of your transaction.

        Each call starts another one; the new flow has no idempotency key, and says in ``forked_from`` whose steps it
        has.

        Raises:
            IllegalTransition: it has neither failed nor was it cancelled; or it has cleaned up, so that what it
                recorded may be undone; or it is a child, whose parent would not be told.
            UnknownFlow: its definition, in that version, is not registered here.
            FlowNotFound: as :meth:`get`.
        """
        return FlowHandle(self._runtime, going_back.retry(self._runtime, self.id, session), self._definition)

    def fork(
        self, *, from_step: str, state: dict[str, Any] | None = None, session: Transaction | None = None
    ) -> FlowHandle[Out]:
        """Starts a new flow as :meth:`retry` does, of a flow in whatever status, that takes over what was recorded in
        the places before ``from_step``, and goes on there. With ``session`` it is part of your transaction.

        Args:
            from_step: the name of a step, meaning the first of that name; ``name#2`` for the second; or a run id.
            state: what its ``state()`` is to begin with; None: what this flow's was when it came to that step.

        Raises:
            InvalidData: there is no such step (lists those there are), or the state cannot be JSON.
            UnknownFlow: its definition, in that version, is not registered here.
            FlowNotFound: as :meth:`get`.
        """
        made = going_back.fork(self._runtime, self.id, from_step, state, session)
        return FlowHandle(self._runtime, made, self._definition)

    # ---- the same, for asyncio ----

    async def aget(self) -> Flow:
        """:meth:`FlowHandle.get`, awaited."""
        return await asyncio.to_thread(self.get)

    async def astatus(self) -> FlowStatus:
        """:meth:`FlowHandle.status`, awaited."""
        return await asyncio.to_thread(self.status)

    async def aresult(self, timeout: float | None = None) -> Out:
        """:meth:`FlowHandle.result`, awaited. No thread waits along."""
        look = self._look()
        return self._outcome(await apoll(lambda: asyncio.to_thread(look), timeout), timeout)

    async def acancel(self, *, session: AsyncTransaction | None = None) -> None:
        """:meth:`FlowHandle.cancel`, awaited; ``session`` is an AsyncSession or AsyncConnection."""
        await run(self._runtime, session, self.cancel)

    async def aretry(self, *, session: AsyncTransaction | None = None) -> FlowHandle[Out]:
        """:meth:`FlowHandle.retry`, awaited; ``session`` is an AsyncSession or AsyncConnection."""
        return await run(self._runtime, session, self.retry)

    async def afork(
        self, *, from_step: str, state: dict[str, Any] | None = None, session: AsyncTransaction | None = None
    ) -> FlowHandle[Out]:
        """:meth:`FlowHandle.fork`, awaited; ``session`` is an AsyncSession or AsyncConnection."""
        return await run(self._runtime, session, partial(self.fork, from_step=from_step, state=state))

    async def aresume(self, payload: dict[str, Any] | None = None) -> None:
        """:meth:`FlowHandle.resume`, awaited."""
        await asyncio.to_thread(self.resume, payload)


def call(
    runtime: Runtime, flow_id: UUID, change: Callable[[FlowManager], object], transaction: Transaction | None
) -> None:
    """Makes a change that wakes the flow's driver, and tells the broker after the commit."""
    caller = None if transaction is None else transaction_of(transaction)
    manager = runtime.manager if caller is None else FlowManager(runtime.store.using(caller))
    change(manager)
    store = runtime.store if caller is None else runtime.store.using(caller)
    hint = store.run(dispatch.find_hint, str(flow_id))
    if hint is not None:
        once_committed(caller, lambda: runtime.publisher.publish(hint))
