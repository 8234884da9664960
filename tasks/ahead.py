"""How far sweeps publish ahead of the workers what nobody has begun."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

from celery_flows.store import SqlFlowStore, dispatch

LEAST = 10  # that a sweep publishes all the same: what nobody takes from one queue must not keep others from theirs

NotBegun: TypeAlias = Literal["step", "flow"]  # the rows that nobody has claimed: of members, and drive rows


class Ahead:
    """The rows of a kind that this process's sweeps have published and nobody has claimed yet.

    Without a bound thousands of flows that are due at once, or the members of a large gather, would all be published in
    a few seconds, and again and again for as long as the workers take: a queue full of duplicates, behind which
    everything else would wait.
    """

    def __init__(self) -> None:
        self._run_ids: set[str] = set()

    def room(self, store: SqlFlowStore, limit: int) -> int:
        """How many more a sweep may publish now."""
        if self._run_ids:
            self._run_ids.intersection_update(store.run(dispatch.list_unclaimed_of, sorted(self._run_ids)))
        return min(limit, max(limit - len(self._run_ids), LEAST))

    def add(self, run_ids: Iterable[str]) -> None:
        """Has these been published."""
        self._run_ids.update(run_ids)
