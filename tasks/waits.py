"""Waits that need no worker: flows that no definition drives are resumed by whoever looks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from celery_flows.store import SqlFlowStore, inbox
from celery_flows.store.clock import as_utc
from celery_flows.store.dispatch import list_unsettled

log = logging.getLogger("celery_flows.waits")


@dataclass(frozen=True, slots=True)
class TickReport:
    """What one tick did."""

    scanned: int = 0
    resumed: int = 0
    cancelled: int = 0
    still_waiting: int = 0
    errors: int = 0


class WaitEngine:
    """Settles the waits of flows that were made with ``FlowManager.create_managed``."""

    def __init__(self, store: SqlFlowStore) -> None:
        self._store = store

    def tick(self, now: datetime | None = None, *, limit: int = 500) -> TickReport:
        """Resumes the flows whose timer or timeout has come, cancels those that were asked to; one transaction each.

        ``now`` is aware; None means the database's clock, which is what workers use.
        """
        now = None if now is None else as_utc("now", now)
        rows = self._store.run(list_unsettled, limit, now)
        return self.settle([row.flow_id for row in rows if row.flow_id is not None and not row.is_mirror], now)

    def settle(self, flow_ids: Sequence[UUID], now: datetime | None = None) -> TickReport:
        """:meth:`tick` for flows that were found due already."""
        counts = dict.fromkeys(("resumed", "cancelled", "still_waiting", "errors"), 0)
        for flow_id in flow_ids:
            counts[self._settle(flow_id, now)] += 1
        return TickReport(scanned=len(flow_ids), **counts)

    def _settle(self, flow_id: UUID, now: datetime | None) -> str:
        try:
            key = self._store.run(inbox.awaited_key, flow_id)
            while key is not None and self._store.run(inbox.hand_over_next, key) is not None:
                pass  # an event that lies in the inbox comes before a timeout
            if key is not None and self._store.run(inbox.awaited_key, flow_id) is None:
                return "resumed"
            return self._store.run(inbox.settle_wait, flow_id, now) or "still_waiting"
        except Exception as error:  # one flow's trouble is not the others'
            log.warning("the wait of flow %s is not settled yet (%s)", flow_id, type(error).__name__)
            return "errors"

    def resume_external(self, flow_id: UUID, topic: str, correlation_id: str, payload: Any) -> bool:
        """Resumes one flow if it waits for just this event; False if it does not.

        Raises:
            InvalidData: the payload cannot be JSON.
        """
        return self._store.run(inbox.resume_external, flow_id, topic, correlation_id, payload)
