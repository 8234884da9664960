"""What the application holds of a flow it started."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import UUID

from celery_flows.store import (
    AlreadyTerminal,
    Flow,
    FlowManager,
    FlowNotFound,
    FlowStatus,
    SqlFlowStore,
    dispatch,
    inbox,
)
from celery_flows.store import operations as op
from celery_flows.store.models import new_id
from celery_flows.store.script import Call
from celery_flows.store.transitions import check_open
from celery_flows.store.validation import MAX_PAYLOAD_BYTES, check_mapping, check_name, check_text
from celery_flows.tasks import going_back
from celery_flows.tasks.aio import AsyncTransaction, run
from celery_flows.tasks.approval import Approval, approval_key
from celery_flows.tasks.emit import emit
from celery_flows.tasks.errors import FlowCancelled, FlowFailed, ResultTimedOut
from celery_flows.tasks.failures import cause_of
from celery_flows.tasks.polling import apoll, check_seconds
from celery_flows.tasks.transaction import Transaction, once_committed, transaction_of

if TYPE_CHECKING:
    from celery_flows.tasks.registry import FlowDefinition
    from celery_flows.tasks.runtime import Runtime

Out = TypeVar("Out")
T = TypeVar("T")


class FlowHandle(Generic[Out]):
    """A flow's id, and what can be asked of it. Reads the store, never the broker.

    Of a flow that has gone on as another (``run.restart_as``) the last one is meant, by all but :meth:`get` and
    :meth:`fork`: these are about the history that goes by this id.
    """

    def __init__(self, runtime: Runtime, flow_id: UUID, definition: FlowDefinition[Any, Out] | None = None) -> None:
        self.id = flow_id
        self._latest = flow_id  # of what goes on for it, as far as that was known when it was last asked
        self._runtime = runtime
        self._definition = definition

    def __repr__(self) -> str:
        return f"FlowHandle({self.id})"

    def get(self) -> Flow:
        """The flow as stored now; ``continued_as`` says which has gone on for it.

        Raises:
            FlowNotFound: it was never committed, or it was pruned.
        """
        return self._runtime.manager.get(self.id)

    def status(self) -> FlowStatus:
        """The flow's status now.

        Raises:
            FlowNotFound: as :meth:`get`.
        """
        return self._last_life().status

    def state(self) -> dict[str, Any]:
        """What the flow has told of itself until now, by ``run.update(…)``.

        Raises:
            FlowNotFound: as :meth:`get`.
        """
        return self._last_life().state_json

    def result(self, timeout: float | None = None) -> Out:
        """Waits until the flow has ended and gives its result, validated by the flow function's annotation.

        Args:
            timeout: seconds; None waits for as long as it takes.

        Raises:
            InvalidData: the timeout is no number.
            FlowFailed: it failed; says why.
            FlowCancelled: it was cancelled.
            ResultTimedOut: it has not ended in time. The flow goes on.
            FlowNotFound: as :meth:`get`.
        """
        check_seconds("timeout", timeout)
        return self._outcome(self._runtime.wait_until(self._look, timeout), timeout)

    def _outcome(self, flow: Flow | None, timeout: float | None) -> Out:
        if flow is None:
            assert timeout is not None
            raise ResultTimedOut(self.id, timeout)
        if flow.status is FlowStatus.CANCELLED:
            raise FlowCancelled(flow.id)
        if flow.status is FlowStatus.FAILED:
            error = flow.error_json or {}
            reason = flow.state_json.get("failure", {}).get("reason", "unknown")
            what = error.get("type", "unknown"), error.get("message", "")
            raise FlowFailed(flow.id, reason, *what, error.get("undo_failed", ()), cause_of(error))
        definition = self._runtime.registry.get(flow.controller_id, flow.definition_version) or self._definition
        result: Out = flow.result_json if definition is None else definition.output.decode("result", flow.result_json)
        return result

    def _look(self) -> Flow | None:
        """The flow, if it has ended."""
        flow = self._last_life()
        return flow if flow.status.is_terminal else None

    def _last_life(self, store: SqlFlowStore | None = None) -> Flow:
        flow: Flow | None = (store or self._runtime.store).run(op.get_last_life, self._latest)
        if flow is None:
            raise FlowNotFound(self.id)
        self._latest = flow.id
        return flow

    def _change(self, change: Callable[[SqlFlowStore, UUID], T], session: Transaction | None) -> T:
        """Changes the last life: if another begins meanwhile, that one."""
        store = self._store(session)
        while True:
            flow_id = self._last_life(store).id
            try:
                return change(store, flow_id)
            except AlreadyTerminal:
                if self._last_life(store).id == flow_id:
                    raise

    def _change_and_call(
        self, change: Callable[[SqlFlowStore, UUID], object], session: Transaction | None = None
    ) -> None:
        """Makes a change that wakes the flow's driver, and tells the broker after the commit."""
        self._change(change, session)
        hint = self._store(session).run(dispatch.find_hint, str(self._latest))
        if hint is not None:
            caller = None if session is None else transaction_of(session)
            once_committed(caller, lambda: self._runtime.publisher.publish(hint))

    def _store(self, session: Transaction | None) -> SqlFlowStore:
        return self._runtime.store if session is None else self._runtime.store.using(transaction_of(session))

    def cancel(self, *, session: Transaction | None = None) -> None:
        """Asks the flow to cancel, paused or not: sticky. It cleans up first, so ``status()`` may say cancelled only
        later.

        Raises:
            AlreadyTerminal: it has ended.
            FlowNotFound: as :meth:`get`.
        """
        self._change_and_call(lambda store, flow_id: FlowManager(store).request_cancel(flow_id), session)

    def pause(self, *, session: Transaction | None = None) -> None:
        """Keeps workers from going on with the flow after the step in hand; its timers and deadline wait, too. Steps
        that are out on queues are run. A cancel comes first.

        Raises:
            AlreadyTerminal: it has ended.
            FlowNotFound: as :meth:`get`.
        """
        self._change_and_call(lambda store, flow_id: FlowManager(store).pause(flow_id), session)

    def unpause(self, *, session: Transaction | None = None) -> None:
        """Lets workers go on with the flow.

        Raises:
            AlreadyTerminal: it has ended.
            FlowNotFound: as :meth:`get`.
        """
        self._change_and_call(lambda store, flow_id: FlowManager(store).unpause(flow_id), session)

    def approve(self, name: str, *, by: str, comment: str = "", session: Transaction | None = None) -> bool:
        """Grants what the flow asks for by ``run.approval(name)``, or will ask for: an approval that comes early is
        kept, and each answers one question: a second one the next of this name. With ``session`` it is part of your
        transaction.

        Returns:
            True: the flow asks for it, and this is the answer. False: it is kept, for the flow does not ask yet, or has
            its answer already. With ``session`` as it looks before your commit: another answer may still come first; as
            one to another question may, where ``run.first`` waits for several.

        Raises:
            InvalidData: a name is empty or too long.
            AlreadyTerminal: the flow has ended.
            FlowNotFound: as :meth:`get`.
        """
        return self._decide(name, True, by, comment, session)

    def reject(self, name: str, *, by: str, comment: str = "", session: Transaction | None = None) -> bool:
        """Refuses what the flow asks for by ``run.approval(name)``; as :meth:`approve`."""
        return self._decide(name, False, by, comment, session)

    def _decide(self, name: str, granted: bool, by: str, comment: str, session: Transaction | None) -> bool:
        check_name("by", by)
        check_text("comment", comment, limit=MAX_PAYLOAD_BYTES)

        def decide(store: SqlFlowStore, flow_id: UUID) -> bool:
            key = approval_key(flow_id, name)
            check_open(FlowManager(store).get(flow_id), "approved")
            decided = Approval(granted=granted, by=by, at=store.run(op.now), comment=comment)
            event_id = emit(self._runtime, *key, decided.model_dump(mode="json"), session)
            return store.run(inbox.is_taken, event_id)

        return self._change(decide, session)

    def resume(self, payload: dict[str, Any] | None = None) -> None:
        """Resumes a flow that waits: what it waits for has come, with this payload. A flow that no definition drives
        has the payload merged into its state.

        Raises:
            InvalidData: the payload is no dictionary, or cannot be JSON.
            IllegalTransition: it does not wait.
            FlowNotFound: as :meth:`get`.
        """
        if payload is not None:
            check_mapping("payload", payload)
        write_id = new_id()

        def resume(store: SqlFlowStore, flow_id: UUID) -> object:
            resumed = Call(inbox.resume_by_hand, (flow_id, payload, write_id))
            return store.attempt(resumed, settled=Call(op.find_locked, (flow_id, write_id)))

        self._change_and_call(resume)

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
        made = going_back.retry(self._runtime, self._last_life(self._store(session)).id, session)
        return FlowHandle(self._runtime, made, self._definition)

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
        check_seconds("timeout", timeout)
        return self._outcome(await apoll(lambda: asyncio.to_thread(self._look), timeout), timeout)

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
