"""The proof by audit: every flow's events folded and held against its rows, one flow after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Concatenate, ParamSpec, Protocol, TypeVar
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Connection

from celery_flows.store.changes import ORDER
from celery_flows.store.fold import FLOW_FIELDS, STEP_FIELDS, Fold, Ranges, differing
from celery_flows.store.models import TERMINAL, Flow, FlowStatus, FlowStep
from celery_flows.store.operations import each_event, get_flow, reads, reads_snapshot
from celery_flows.store.tables import (
    UtcDateTime,
    flow_dispatch,
    flow_events,
    flow_steps,
    flows,
)

P = ParamSpec("P")
T = TypeVar("T")

FLOW_PAGE = 200


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it must be. ``kind`` is one of the keys of :data:`KINDS`."""

    flow_id: UUID | None
    kind: str
    about: str  # names columns, run ids and revisions, never values

    def __str__(self) -> str:
        return f"{self.flow_id or 'no flow'}: {KINDS[self.kind]}: {self.about}"


KINDS = {
    "gap": "revisions without an event (written past the manager, or events were deleted)",
    "untold": "revisions whose event does not tell the change (update_and_append by hand)",
    "order": "revisions out of order",
    "beyond": "an event has a higher revision than the row",
    "flow": "the row differs from its events",
    "step": "a step differs from its events",
    "step_without_events": "a step that no event tells of",
    "step_missing": "events tell of a step that is not there",
    "step_gap": "a step's events do not follow from each other (some were deleted)",
    "open_step": "a step is open although the flow has ended",
    "dispatch": "the flow has ended and still has dispatch rows",
    "undriven": "the flow is open, and nothing would drive it on",
    "join": "the flow counts other open members than it has",
    "orphan": "rows that belong to no flow",
}


class Runner(Protocol):
    """A store, as far as an audit needs one."""

    def run(self, operation: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T: ...


@dataclass(frozen=True, slots=True)
class Dispatched:
    """A dispatch row, as far as an audit looks at it."""

    kind: str
    fence: int
    open_members: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A flow with everything that belongs to it, read in one transaction."""

    flow: Flow
    fold: Fold
    steps: dict[str, FlowStep]
    dispatch: dict[str, Dispatched]  # by run id
    was_driven: bool


def verify(
    store: Runner,
    flow_ids: Sequence[UUID] | None = None,
    *,
    since: datetime | None = None,
    limit: int | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> Iterator[Finding]:
    """Audits flows, one after another, and gives what is wrong with each.

    Args:
        flow_ids: only these; None: all, and rows that belong to no flow besides.
        since: only flows updated since then (aware).
        limit: at most so many flows, the most recently created first.
        progress: is told how many flows have been looked at.
    """
    if flow_ids is None and since is None and limit is None:
        yield from store.run(find_orphans)
    for number, flow_id in enumerate(flow_ids if flow_ids is not None else _all_ids(store, since, limit), 1):
        snapshot = store.run(take_snapshot, flow_id)
        if snapshot is not None:
            yield from findings(snapshot)
        elif flow_ids is not None:
            yield Finding(flow_id, "orphan", "there is no such flow")
        progress(number)


def _all_ids(store: Runner, since: datetime | None, limit: int | None) -> Iterator[UUID]:
    after, left = None, limit
    while left is None or left > 0:
        page = store.run(page_of_ids, since, after, FLOW_PAGE if left is None else min(left, FLOW_PAGE))
        if not page:
            return
        yield from page
        after = page[-1]
        left = None if left is None else left - len(page)


@reads
def page_of_ids(conn: Connection, since: datetime | None, after: UUID | None, limit: int) -> list[UUID]:
    """The next flows' ids, the latest first: ids of version 7 are in the order of creation."""
    query = sa.select(flows.c.id).order_by(flows.c.id.desc()).limit(limit)
    if since is not None:
        query = query.where(flows.c.updated_at >= sa.literal(since, UtcDateTime()))
    if after is not None:
        query = query.where(flows.c.id < after)
    return list(conn.execute(query).scalars())


@reads_snapshot
def take_snapshot(conn: Connection, flow_id: UUID) -> Snapshot | None:
    """Reads a flow, its steps, dispatch rows and events, all as of one moment; None: no such flow."""
    flow = get_flow(conn, flow_id)
    if flow is None:
        return None
    steps = conn.execute(sa.select(flow_steps).where(flow_steps.c.flow_id == flow_id)).mappings()
    dispatch = sa.select(*(flow_dispatch.c[name] for name in ("run_id", "kind", "fence", "open_members")))
    dispatch = dispatch.where(flow_dispatch.c.flow_id == flow_id)
    fold, was_driven = Fold(), False
    for event in each_event(conn, flow_id):
        fold.add(event)
        was_driven = was_driven or (event.kind == "created" and event.payload_json.get("driven") is True)
    return Snapshot(
        flow=flow,
        fold=fold,
        steps={row["run_id"]: FlowStep.of_row(row) for row in steps},
        dispatch={run_id: Dispatched(*row) for run_id, *row in conn.execute(dispatch)},
        was_driven=was_driven,
    )


def findings(snapshot: Snapshot) -> Iterator[Finding]:
    """What is wrong with one flow."""
    flow, fold = snapshot.flow, snapshot.fold

    def found(kind: str, about: str) -> Finding:
        return Finding(flow.id, kind, about)

    gaps = fold.revisions.missing(flow.revision)
    if gaps:
        yield found("gap", _numbers(gaps))
    if fold.untold:
        yield found("untold", _numbers(fold.untold))
    if fold.disordered:
        yield found("order", _numbers(fold.disordered))
    if beyond := fold.revisions.above(flow.revision):
        yield found("beyond", _numbers(beyond))
    if not gaps and not fold.untold and (names := differing(flow, fold.flow, FLOW_FIELDS)):
        yield found("flow", ", ".join(names))
    yield from _step_findings(snapshot, found)
    if flow.status in TERMINAL and snapshot.dispatch:
        yield found("dispatch", ", ".join(sorted(snapshot.dispatch)))
    if flow.status not in TERMINAL:
        yield from _join_findings(snapshot, found)
    called = flow.status is FlowStatus.WAITING or (snapshot.was_driven and flow.status not in TERMINAL)
    if called and str(flow.id) not in snapshot.dispatch:
        yield found("undriven", "its drive row is missing")


def _step_findings(snapshot: Snapshot, found: Callable[[str, str], Finding]) -> Iterator[Finding]:
    for run_id, step in snapshot.steps.items():
        told = snapshot.fold.steps.get(run_id)
        if told is None:
            yield found("step_without_events", run_id)
        elif names := differing(step, told, STEP_FIELDS):
            yield found("step", f"{run_id}: {', '.join(names)}")
        if kind := snapshot.fold.torn.get(run_id):
            yield found("step_gap", f"{run_id}: before {kind}")
        elif (row := snapshot.dispatch.get(run_id)) and row.fence != snapshot.fold.fences.get(run_id):
            yield found("step_gap", f"{run_id}: its last claim")
        if snapshot.flow.status in TERMINAL and not step.status.is_terminal:
            yield found("open_step", run_id)
    for run_id in snapshot.fold.steps.keys() - snapshot.steps.keys():
        yield found("step_missing", run_id)


def _join_findings(snapshot: Snapshot, found: Callable[[str, str], Finding]) -> Iterator[Finding]:
    drive = snapshot.dispatch.get(str(snapshot.flow.id))
    rows = snapshot.dispatch.items()  # the order to cancel a child is a row of the child's, and no member
    members = [run_id for run_id, row in rows if row.kind in ("step", "child") and not run_id.startswith(ORDER)]
    if drive is not None and drive.open_members != len(members):
        yield found("join", f"{drive.open_members}, and there are {len(members)}")
    for run_id, step in snapshot.steps.items():
        if run_id in snapshot.fold.fences and not step.status.is_terminal and run_id not in snapshot.dispatch:
            yield found("undriven", f"{run_id}: its dispatch row is missing")


@reads
def find_orphans(conn: Connection) -> list[Finding]:
    """Steps, events and dispatch rows of flows that are not there. Foreign keys forbid them, where they are kept."""
    orphans = []
    for table in (flow_steps, flow_events, flow_dispatch):
        gone = ~sa.exists().where(flows.c.id == table.c.flow_id)
        count = sa.select(sa.func.count()).select_from(table).where(table.c.flow_id.isnot(None), gone)
        if number := conn.scalar(count):
            orphans.append(Finding(None, "orphan", f"{number} in {table.name}"))
    return orphans


def _numbers(values: Ranges) -> str:
    listed = ", ".join(str(value) for value in islice(values, 10))
    return listed + (f" and {len(values) - 10} more" if len(values) > 10 else "")
