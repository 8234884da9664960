"""The contract of a store: fourteen methods, each one documented transition of what is stored."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any
from uuid import UUID

from celery_flows.store.errors import FlowNotFound
from celery_flows.store.models import Flow, FlowEvent, FlowStatus, FlowStep
from celery_flows.store.transitions import Transition

log = logging.getLogger("celery_flows.store")
NOT_ATOMIC = "%s.update_and_append is not atomic: a crash between its two writes tears the flow's history"


class FlowStore(ABC):
    """Keeps flows, their steps and their events. Subclass it to keep them elsewhere; :class:`SqlFlowStore` is ours.

    Every method is a transaction of its own. Records are validated before they get here, and come back as stored.
    """

    @abstractmethod
    def insert(self, flow: Flow) -> None:
        """Stores a new flow as given, without an event.

        Raises:
            DuplicateFlow: its id, or its key within its definition, is taken.
        """

    @abstractmethod
    def get(self, flow_id: UUID) -> Flow | None:
        """Gives the flow, or None."""

    @abstractmethod
    def list_by_owner(self, owner_session_key: str, limit: int | None = 100, after: Flow | None = None) -> list[Flow]:
        """Gives an owner's flows, newest created first.

        ``after`` is the last flow of the page before. A limit below 1 gives none; None gives all.
        """

    @abstractmethod
    def list_by_status(self, status: FlowStatus, limit: int | None = 100, after: Flow | None = None) -> list[Flow]:
        """Gives the flows in a status, longest not updated first.

        ``after`` and ``limit`` as in :meth:`list_by_owner`.
        """

    @abstractmethod
    def update_with_revision(self, flow: Flow) -> Flow:
        """Stores the flow where id and revision match; gives it back with revision + 1 and a new ``updated_at``.

        Raises:
            FlowNotFound: no such flow.
            RevisionMismatch: somebody changed it in between; nothing was written.
        """

    @abstractmethod
    def append_event(self, flow_id: UUID, kind: str, payload: dict[str, Any]) -> FlowEvent:
        """Appends a fact to a flow's history; its row stays as it is.

        Raises:
            FlowNotFound: no such flow.
            InvalidData: the payload is not JSON, or the kind is no name.
        """

    @abstractmethod
    def list_events(self, flow_id: UUID, limit: int | None = 100, after: FlowEvent | None = None) -> list[FlowEvent]:
        """Gives a flow's events, newest first. A limit below 1 gives none, never all."""

    @abstractmethod
    def insert_step(self, step: FlowStep) -> None:
        """Stores a new step as given.

        Raises:
            DuplicateStep: its id, or its run id within the flow, is taken.
            FlowNotFound: no such flow.
        """

    @abstractmethod
    def update_step(self, step: FlowStep) -> FlowStep:
        """Stores the step by its id, with a new ``updated_at``.

        Raises:
            StepNotFound: no such step.
        """

    @abstractmethod
    def get_step(self, step_id: UUID) -> FlowStep | None:
        """Gives the step, or None."""

    @abstractmethod
    def list_steps(self, flow_id: UUID, limit: int | None = None, after: FlowStep | None = None) -> list[FlowStep]:
        """Gives a flow's steps, oldest first."""

    @abstractmethod
    def find_step_by_run_id(self, flow_id: UUID, run_id: str) -> FlowStep | None:
        """Gives the step with this run id within this flow, or None."""

    def update_and_append(self, flow: Flow, event_kind: str, event_payload: dict[str, Any]) -> tuple[Flow, FlowEvent]:
        """Stores the flow and appends its event, in one transaction or not at all.

        This fallback cannot do that: it makes the two calls one after the other, and logs a warning. Override it.

        Raises:
            FlowNotFound, RevisionMismatch: nothing was written.
        """
        log.warning(NOT_ATOMIC, type(self).__name__)
        stored = self.update_with_revision(flow)
        return stored, self.append_event(flow.id, event_kind, event_payload)

    def prune_terminal_flows(self, retain_days: int) -> int:
        """Deletes the terminal flows not updated for ``retain_days`` days, steps and events with them; says how many.

        Raises:
            InvalidData: for a negative number.
            NotImplementedError: this store has no retention of its own.
        """
        raise NotImplementedError(f"{type(self).__name__} does not prune; override prune_terminal_flows")

    # What the manager needs besides, with fallbacks that are as good as the fourteen methods allow.

    def insert_and_append(self, flow: Flow, event_payload: dict[str, Any]) -> None:
        """Stores a new flow and its ``created`` event. The fallback is not atomic.

        Raises:
            DuplicateFlow: nothing was written.
        """
        log.warning(NOT_ATOMIC, type(self).__name__)
        self.insert(flow)
        self.append_event(flow.id, "created", event_payload)

    def update_locked(self, flow_id: UUID, decide: Callable[[Flow], Transition | None]) -> Flow:
        """Reads the flow, has ``decide`` say what changes, and writes that, the row locked in between.

        The fallback has no lock, so it may still meet another writer.

        Raises:
            FlowNotFound: no such flow. Whatever ``decide`` raises; nothing was written.
        """
        flow = self.get(flow_id)
        if flow is None:
            raise FlowNotFound(flow_id)
        transition = decide(flow)
        if transition is None:
            return flow
        return self.update_and_append(transition.applied_to(flow), transition.kind, transition.told())[0]

    def upsert_step(self, step: FlowStep) -> FlowStep:
        """Inserts an observed step, or brings the one with this run id forward; a closed one stays as it is.

        The fallback may meet another writer, and writes no event.

        Raises:
            FlowNotFound: no such flow.
        """
        known = self.find_step_by_run_id(step.flow_id, step.run_id)
        if known is None:
            self.insert_step(step)
            return step
        if known.status.is_terminal or known.runtime is not step.runtime:
            return known
        given = {name: getattr(step, name) for name in ("child_session_key", "result_json", "error_json")}
        kept = {name: value for name, value in given.items() if value is not None}
        return self.update_step(known.but(status=step.status, **kept))
