"""``celery flow doctor``: is all well, and if not, why, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from celery_flows.store import StoreError, health, schema
from celery_flows.store import operations as op
from celery_flows.store.clock import boottime
from celery_flows.store.health import Heartbeat, Row
from celery_flows.tasks import maintenance, slots
from celery_flows.tasks.errors import HistoryMismatch
from celery_flows.tasks.publish import DRIVE_TASK
from celery_flows.tasks.runtime import Runtime
from celery_flows.worker.output import printable

CLOCK_SECONDS = 5.0  # a machine further off shows times that mislead whoever reads them
OVERDUE_SECONDS = 60.0  # sweeps look every second
QUEUED_SECONDS = 600.0  # for a slot of a limit
PUBLISHED_TIMES = 3  # with the default pauses: some 15 seconds unclaimed
CRASHES = 2
DAY_SECONDS = 86_400.0


class Kind(NamedTuple):
    """A kind of finding: ``is_problem`` if flows do not go on, or are in danger; else it is worth knowing."""

    is_problem: bool
    cause: str
    remedy: str


KINDS = {
    "database": Kind(True, "the database cannot be reached", "start it, or correct flow_store_url"),
    "schema": Kind(True, "the tables are of another version than this program", "run `celery -A APP flow migrate`"),
    "clock": Kind(
        False,
        "this machine's clock and the database's differ; flows go by the database's alone",
        "keep both machines' time by NTP",
    ),
    "broker": Kind(True, "the broker cannot be reached", "start it, or correct broker_url (CELERY_BROKER_URL)"),
    "no_consumer": Kind(
        True,
        "work waits on a queue, and no worker that knows its tasks takes from it",
        "start a worker with -Q QUEUE, from this application",
    ),
    "no_answer": Kind(
        False,
        "work waits, workers sweep, and none of them answered: busy under the solo pool, or without remote control",
        "ask again with a longer --timeout; look at the workers if the work stays",
    ),
    "unclaimed": Kind(
        False,
        "work was published again and again, and no worker has claimed it: they are busy, or stuck",
        "look at the workers of that queue; add some if they are busy",
    ),
    "overdue": Kind(
        True, "work has been due for long, and no sweep has looked at it", "start a worker; look for errors in its log"
    ),
    "queued": Kind(
        False,
        "flows have queued for a slot of their limit for long: more are started than it lets through, or those that "
        "have the slots take long",
        "raise the limit, or look at the flows that run",
    ),
    "stalled": Kind(
        False,
        "work is held and its lease renewed, but nothing has been recorded for long: a step that takes long, or hangs",
        "look at that process; if it hangs, end it, and the work is done again elsewhere",
    ),
    "sweep_silent": Kind(
        True, "no worker has swept: none runs, or their sweeps fail", "start a worker; look for errors in its log"
    ),
    "beat_silent": Kind(
        False, "beat's sweep has not run: beat does not run, or no worker takes its tasks", "start `celery -A APP beat`"
    ),
    "chore_silent": Kind(False, "a chore of beat's has not been done when it should", "look at beat and its log"),
    "slot_missed": Kind(
        False,
        "the time at which a schedule was to start a flow has passed, and nobody has looked: beat does not run, or no "
        "worker takes its tasks",
        "start `celery -A APP beat`; what is made up for then, the flow's catch_up says",
    ),
    "slot_skipped": Kind(
        False,
        "within a day the time at which a schedule was to start a flow came while the flow of the time before was "
        'open; it was left out, as overlap="skip" says',
        'none, if that is meant; else start less often, look at what takes long, or say overlap="wait"',
    ),
    "unknown_flow": Kind(
        True,
        "flows are open whose definition this application does not have; they wait for a worker that does",
        "deploy it again, name its module in flow_imports, or end the flows without their cleanup: "
        "celery flow cancel --now ID",
    ),
    "history_refused": Kind(
        True,
        "flows are left alone, for the function here is not the one that their history was made by",
        "deploy the old function again, under its version, and give the new one a version of its own (a look follows "
        "every 10 minutes); or cancel the flow, which then ends without its cleanup",
    ),
    "unknown_task": Kind(
        True,
        "steps are open whose task this application does not have; they wait for a worker that does",
        "deploy it again, import its module, or cancel those flows",
    ),
    "crashing": Kind(
        True,
        "work has killed its worker more than once, and is tried again up to flow_max_crashes",
        "look for memory, signals and native code in that step; cancel the flow if it does harm",
    ),
    "lost": Kind(
        False,
        "flows failed within a day because work of theirs killed every worker that took it, or nothing was heard of it",
        "mend the step, then start them again; look at the worker's log",
    ),
    "history": Kind(
        True,
        "an audit found histories that differ from their flows",
        "run `celery -A APP flow verify`; find out who changed rows or events by hand, or restore from a backup",
    ),
    "untold": Kind(
        False,
        "flows were changed past the manager, so their histories do not tell all",
        "change flows by the manager: update_with_revision and update_and_append leave the telling to you",
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not well. ``kind`` is one of the keys of :data:`KINDS`."""

    kind: str
    about: str  # what it is, with names and ids, never a payload

    def __str__(self) -> str:
        kind = KINDS[self.kind]
        said = f"{'problem' if kind.is_problem else 'notice'} {self.kind}: {self.about}"
        return f"{printable(said)}\n  cause: {kind.cause}\n  remedy: {kind.remedy}"

    @property
    def is_problem(self) -> bool:
        """Whether flows do not go on, or are in danger: then the application is not ready."""
        return KINDS[self.kind].is_problem

    def as_json(self) -> dict[str, Any]:
        """For programs: the same keys, always."""
        kind = KINDS[self.kind]
        return {**asdict(self), "problem": kind.is_problem, "cause": kind.cause, "remedy": kind.remedy}


def examine(runtime: Runtime, *, stalled_seconds: float = 3600.0, reply_seconds: float = 1.0) -> list[Finding]:
    """Everything that is not well, as far as this process can see; reads only.

    Args:
        stalled_seconds: how long held work may record nothing.
        reply_seconds: how long workers have to answer.

    Raises:
        InvalidData: ``flow_store_url`` is not set, or a setting is bad.
    """
    try:
        found = [*_schema(runtime)]
        if not found:
            found = [*_store(runtime, stalled_seconds)]
        waiting = [] if any(finding.kind == "schema" for finding in found) else _waiting(runtime)
    except StoreError as error:
        found, waiting = [Finding("database", str(error))], []
    return [*found, *_broker(runtime, waiting, reply_seconds)]


def _schema(runtime: Runtime) -> Iterator[Finding]:
    version = runtime.schema_version()
    if version != schema.head():
        yield Finding("schema", f"the database is at {version or 'no version'}, this program needs {schema.head()}")


def _store(runtime: Runtime, stalled_seconds: float) -> Iterator[Finding]:
    asked = boottime()
    before = datetime.now(UTC)
    now = runtime.store.run(op.now)
    off = (now - before).total_seconds()
    if not -CLOCK_SECONDS <= off <= CLOCK_SECONDS + boottime() - asked:
        yield Finding("clock", f"the database's is {abs(off):.0f} s {'ahead' if off > 0 else 'behind'}")
    yield from _chores(runtime, now)
    yield from _work(runtime, now, stalled_seconds)


def _chores(runtime: Runtime, now: datetime) -> Iterator[Finding]:
    beats = runtime.store.run(health.list_heartbeats)
    is_used = runtime.store.run(health.has_open_flows)
    for name, kind in (maintenance.SWEEP, "sweep_silent"), (maintenance.BEAT, "beat_silent"):
        if is_used and (silence := _silence(beats.get(name), now)):
            yield Finding(kind, silence)
    for flow, slot in slots.missed(runtime):
        yield Finding("slot_missed", f"flow {flow!r} at {slot.isoformat()}")
    for flow, left_out in slots.skipped(runtime):
        if (now - left_out.last).total_seconds() < DAY_SECONDS:
            yield Finding("slot_skipped", f"flow {flow!r} at {left_out.last.isoformat()}; {left_out.count} so far")
    for name in maintenance.PRUNE, maintenance.VERIFY:
        if name in beats and (silence := _silence(beats[name], now)):
            yield Finding("chore_silent", f"{name}: {silence}")
    for finding in maintenance.audited(runtime, maintenance.torn_flows(runtime)):  # as it is by now
        yield Finding("untold" if finding.kind in ("gap", "untold") else "history", str(finding))


def _silence(beat: Heartbeat | None, now: datetime) -> str | None:
    """How long nobody has been heard of, if that is too long."""
    if beat is None:
        return "never seen"
    silent = (now - beat.at).total_seconds()
    return f"last seen {silent:.0f} s ago" if silent > 3 * beat.every_seconds + OVERDUE_SECONDS / 2 else None


def _work(runtime: Runtime, now: datetime, stalled_seconds: float) -> Iterator[Finding]:
    store = runtime.store
    count, since = store.run(health.overdue, OVERDUE_SECONDS)
    if since is not None:
        yield Finding("overdue", f"{count} rows, the first for {(now - since).total_seconds():.0f} s")
    for group in store.run(health.list_unclaimed, PUBLISHED_TIMES):
        yield Finding("unclaimed", f"{group.count} of {group.task!r} on queue {_queue(runtime, group.queue)}")
    for queue in store.run(health.list_queued, QUEUED_SECONDS):
        waited = (now - queue.since).total_seconds()
        yield Finding("queued", f"{queue.count} of {queue.definition!r}, the first for {waited:.0f} s")
    for row in store.run(health.list_stalled, stalled_seconds):
        since = row.since or now
        yield Finding("stalled", f"{_row(row)}, held by {row.worker}, for {(now - since).total_seconds():.0f} s")
    for row in store.run(health.list_crashing, CRASHES):
        limit = runtime.settings.max_crashes
        yield Finding("crashing", f"{_row(row)}: {row.crash_count} crashes, given up at {limit}")
    if lost := store.run(health.list_failures, DAY_SECONDS, ("DriverLost", "StepLost", "MirrorLost")):
        yield Finding("lost", f"{len(lost)} flows: {_listed(map(str, lost))}")
    for name, version, count in store.run(health.list_needed_definitions):
        if runtime.registry.get(name, version) is None:
            yield Finding("unknown_flow", f"{count} of {name!r}, version {version}")
    for group in store.run(health.list_needed_tasks):
        if group.task not in runtime.app.tasks:
            yield Finding("unknown_task", f"{group.count} of {group.task!r}")
    for flow_id, name, why in store.run(health.list_refused, HistoryMismatch.__name__):
        yield Finding("history_refused", f"flow {flow_id} of {name!r}: {why}")


def _row(row: Row) -> str:
    return f"{'flow' if row.kind == 'drive' else 'step'} {row.task!r} of flow {row.flow_id}"


def _waiting(runtime: Runtime) -> list[tuple[str, int]]:
    return [(_queue(runtime, group.queue), group.count) for group in runtime.store.run(health.list_waiting)]


def _queue(runtime: Runtime, name: str | None) -> str:
    return name or runtime.default_queue()


def _broker(runtime: Runtime, waiting: Sequence[tuple[str, int]], reply_seconds: float) -> Iterator[Finding]:
    """Asks the broker, and over it the workers; everything is bounded."""
    try:
        with runtime.publisher.connect() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0)
            served = _served(runtime, connection, reply_seconds) if waiting else {}
    except Exception as error:  # whatever the transport raises: it could not be asked
        yield Finding("broker", type(error).__name__)
        return
    silent = bool(waiting) and not served and _are_sweeping(runtime)
    for queue, count in waiting:
        if silent:
            yield Finding("no_answer", f"{count} rows wait on queue {queue}")
        elif not any(queue in queues for queues in served.values()):
            yield Finding("no_consumer", f"{count} rows wait on queue {queue}; no worker answered for it")


def _served(runtime: Runtime, connection: Any, reply_seconds: float) -> dict[str, set[str]]:
    """The workers that answered, and the queues from which those with our tasks take."""
    inspect = runtime.app.control.inspect(timeout=reply_seconds, connection=connection)
    registered = inspect.registered() or {}
    queues = (inspect.active_queues() or {}) if registered else {}
    served: dict[str, set[str]] = {}
    for worker, tasks in registered.items():
        names = {task.partition(" [")[0] for task in tasks}  # a task's options may follow its name
        served[worker] = {queue["name"] for queue in queues.get(worker, ())} if DRIVE_TASK in names else set()
    return served


def _are_sweeping(runtime: Runtime) -> bool:
    """Whether some worker is alive, by its sweep's heartbeat."""
    beat = runtime.store.run(health.list_heartbeats).get(maintenance.SWEEP)
    return beat is not None and _silence(beat, runtime.store.run(op.now)) is None


def _listed(names: Iterable[str], limit: int = 5) -> str:
    named = list(names)
    return ", ".join(named[:limit]) + (f" and {len(named) - limit} more" if len(named) > limit else "")
