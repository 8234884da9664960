"""The engine's rules, taken away one at a time. Each mutant must make the simulation fail: so we know that it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from celery_flows.store import dispatch, inbox, sqlite
from celery_flows.store.changes import Change, Park
from celery_flows.store.tables import flow_dispatch, flows
from celery_flows.tasks import drive as drive_module
from celery_flows.tasks import emit as emit_module
from celery_flows.tasks.drive import Driver

_d = flow_dispatch.c


@dataclass(frozen=True)
class Mutant:
    """A rule that is missing: what is replaced, by what, and in which scenarios that shows."""

    name: str
    target: Any
    attribute: str
    plant: Callable[[Any], Any]  # takes what is there, gives what stands in for it
    scenarios: tuple[str, ...]
    first_seed: int = 0  # near one that shows it, to be quick; others would show it later

    @contextmanager
    def planted(self) -> Iterator[None]:
        """The engine without the rule."""
        original = getattr(self.target, self.attribute)
        setattr(self.target, self.attribute, self.plant(original))
        try:
            yield
        finally:
            setattr(self.target, self.attribute, original)


def _then(*statements: Callable[..., Any]) -> Callable[[Any], Any]:
    """The original, and then some more statements on its connection and arguments."""

    def plant(original: Any) -> Any:
        def mutated(conn: Connection, *args: Any, **kwargs: Any) -> Any:
            before = conn.execute(sa.select(flow_dispatch)).mappings().all()
            answer = original(conn, *args, **kwargs)
            for statement in statements:
                statement(conn, before, answer, *args)
            return answer

        if hasattr(original, "mode"):
            mutated.mode = original.mode  # type: ignore[attr-defined]
            mutated.__name__ = original.__name__
        return mutated

    return plant


def _set(conn: Connection, where: Any, **values: Any) -> None:
    conn.execute(sa.update(flow_dispatch).where(where).values(values))


def _keep_expired_worker(conn: Connection, before: Any, answer: Any, row: Any, *_: Any) -> None:
    _set(conn, _d.run_id == row["run_id"], worker=row["worker"])


def _publish_retry(conn: Connection, before: Any, answer: Any, holder: Any, *_: Any) -> None:
    _set(conn, sa.and_(_d.run_id == holder.run_id, answer), publish_count=1)


def _unwind_fence(conn: Connection, before: Any, answer: Any, what: Change, *_: Any) -> None:
    if isinstance(what.drive, Park):
        _set(conn, _d.run_id == str(what.flow_id), fence=0)


def _keep_revision(conn: Connection, before: Any, answer: Any, flow_id: Any, *_: Any) -> None:
    if answer is not None:
        conn.execute(sa.update(flows).where(flows.c.id == flow_id).values(revision=flows.c.revision - 1))


def _undo_drain(conn: Connection, before: Any, answer: Any, flow_id: Any, *_: Any) -> None:
    was = next(row["open_members"] for row in before if row["run_id"] == str(flow_id))
    _set(conn, _d.run_id == str(flow_id), open_members=was)


def _forget_look(conn: Connection, before: Any, answer: Any, *_: Any) -> None:
    conn.execute(sa.delete(flow_dispatch).where(_d.kind == "look"))


def _end_driver_only(original: Any) -> Any:
    def mutated(conn: Connection, flow_id: Any, at: datetime) -> None:
        conn.execute(sa.delete(flow_dispatch).where(_d.run_id == str(flow_id)))

    return mutated


def _park_blindly(original: Any) -> Any:
    def mutated(conn: Connection, what: Park) -> bool:
        wakes: Any = conn.scalar(sa.select(_d.wakes).where(_d.run_id == what.holder.run_id))
        return bool(original(conn, replace(what, wakes=wakes)))

    mutated.mode = original.mode  # type: ignore[attr-defined]
    mutated.__name__ = original.__name__
    return mutated


def _complete_whoever_asks(original: Any) -> Any:
    def mutated(conn: Connection, what: Any) -> Any:
        row = conn.execute(sa.select(_d.fence, _d.worker).where(_d.run_id == what.holder.run_id)).first()
        if row is None:
            return original(conn, what)
        _set(conn, _d.run_id == what.holder.run_id, fence=what.holder.fence, worker=what.holder.worker)
        return original(conn, what)

    return mutated


def _release_all(original: Any) -> Any:
    def mutated(conn: Connection, workers: Any) -> int:
        held = _d.worker.isnot(None)
        values = {"worker": None, "crash_count": _d.crash_count + 1, "due_at": sqlite.now(conn)}
        return conn.execute(sa.update(flow_dispatch).where(held).values(values)).rowcount

    mutated.mode = original.mode  # type: ignore[attr-defined]
    mutated.__name__ = original.__name__
    return mutated


GATHERS = ("gather", "gather fails", "update by hand")
CANCELS = ("cancel cleanup", "cancel failing gather", "cancel gather")
EVENTS = ("one event", "two events", "two waiters", "event or timeout")

# Not here: "open members are set, not added". A failed gather closes all its members before anything else is scheduled,
# so no straggler meets a new join, and setting equals adding; tests/store/test_dispatch_joins.py holds the statement.
MUTANTS = [
    Mutant("a sweep does not free expired rows", sqlite, "_swept", _then(_keep_expired_worker), GATHERS, 24),
    Mutant("a retry can be claimed before it is due", dispatch, "retry_step", _then(_publish_retry), ("retry",)),
    Mutant("the end deletes one row only", sqlite, "_end", _end_driver_only, ("fail by hand", "cancel by hand"), 14),
    Mutant("no lease check before a step", Driver, "check_lease", lambda _: lambda self: None, ("inline",), 5),
    Mutant("a wake ends a lease", sqlite, "_due_if_free", lambda _: lambda at: at, (*CANCELS, "resume by hand"), 92),
    Mutant("a late release ends anybody's lease", dispatch, "release", _release_all, ("inline", *GATHERS), 4),
    Mutant("cleanup beside running members", Driver, "_drain", lambda _: lambda self: None, ("gather fails",)),
    Mutant("the fence begins anew after a rest", sqlite, "change", _then(_unwind_fence), GATHERS),
    Mutant("a claim leaves the revision alone", sqlite, "claim_drive", _then(_keep_revision), ("inline",)),
    Mutant("a park does not compare wakes", dispatch, "park", _park_blindly, ("pause", "one event"), 152),
    Mutant("a drain does not count off", dispatch, "drain", _then(_undo_drain), CANCELS, 14),
    Mutant("a completion does not ask who holds the row", sqlite, "complete", _complete_whoever_asks, GATHERS, 80),
    Mutant("an event without a look row", inbox, "emit", _then(_forget_look), EVENTS, 26),
    Mutant("the waiter does not look", drive_module, "hand_over", lambda _: lambda *a, **k: 0, EVENTS),
    Mutant("the emitter does not look", emit_module, "hand_over", lambda _: lambda *a, **k: 0, EVENTS, 26),
]  # fmt: skip
