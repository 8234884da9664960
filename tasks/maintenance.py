"""The chores: sweep for due work, prune what is past its retention, audit a sample. Small, alike, and counting what
they did. Each leaves a heartbeat, by which it is known that somebody does it."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from random import Random
from typing import Any
from uuid import UUID

from celery_flows.store import FlowError, FlowStepStatus, audit, dispatch, health, inbox, limits, pruning
from celery_flows.store.audit import Finding
from celery_flows.store.changes import Completion, Holder
from celery_flows.store.clock import boottime
from celery_flows.store.dispatch import Swept
from celery_flows.store.pruning import Archive, Progress, Retention
from celery_flows.tasks import metrics, slots
from celery_flows.tasks.admission import give_due
from celery_flows.tasks.children import settle_child
from celery_flows.tasks.emit import hand_over
from celery_flows.tasks.errors import StepLost
from celery_flows.tasks.failures import of_engine
from celery_flows.tasks.mirror import settle_mirror
from celery_flows.tasks.runtime import Runtime
from celery_flows.tasks.waits import WaitEngine

log = logging.getLogger("celery_flows.maintenance")

# The chores that leave heartbeats.
SWEEP, BEAT, PRUNE, VERIFY = "sweep", "beat", "prune", "verify"
BEAT_SWEEP_SECONDS = 10.0  # beat only stands in for workers that are all dead or stuck; they sweep by themselves
HOUR_SECONDS, DAY_SECONDS = 3600.0, 86_400.0

TOLD = 10  # findings of an audit in the log, flows in its heartbeat


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What one sweep did."""

    due: int = 0  # rows that needed somebody to look again
    published: int = 0
    lost: int = 0  # given up after too many crashes
    handed_over: int = 0  # external events
    admitted: int = 0  # limited flows that were given a slot
    settled: int = (
        0  # children and mirrored flows that have ended, or are to be cancelled; waits that no definition drives
    )


def sweep(runtime: Runtime) -> SweepReport:
    """Looks once for due work: frees lost leases, publishes what waits, hands over events, settles waits.

    Any number of processes may sweep at once. Cost follows what is due, not what waits.
    """
    settings, meter, began = runtime.settings, runtime.watch.meter, boottime()
    pauses = settings.republish_seconds, settings.republish_max_seconds
    # What is begun comes first: thousands that are not must not keep it from being gone on with.
    swept = runtime.store.run(dispatch.sweep_due, settings.sweep_limit, *pauses, only="begun")
    for kind, ahead in runtime.ahead.items():
        room = ahead.room(runtime.store, settings.sweep_limit)
        new = runtime.store.run(dispatch.sweep_due, room, *pauses, only=kind)
        ahead.add(row.hint.run_id for row in new)
        swept += new
    lost = [row for row in swept if row.was_held and row.crash_count >= settings.max_crashes]
    hints = [row.hint for row in swept if row not in lost]
    for row in lost:
        _try_to_give_up(runtime, row)
    published = runtime.publisher.publish(*hints)
    unsettled = runtime.store.run(dispatch.list_unsettled, settings.sweep_limit)
    handed_over = sum(_hand_over_event(runtime, row.run_id) for row in unsettled if row.kind == "look")
    seen_to = sum(settle_child(runtime, row.run_id) for row in unsettled if row.kind == "child")
    undriven = [row for row in unsettled if row.kind == "drive" and row.flow_id is not None]
    mirrored = sum(settle_mirror(runtime, row.flow_id) for row in undriven if row.is_mirror and row.flow_id)
    ticked = WaitEngine(runtime.store).settle([row.flow_id for row in undriven if not row.is_mirror and row.flow_id])
    settled = seen_to + mirrored + ticked.resumed + ticked.cancelled
    report = SweepReport(len(swept), published, len(lost), handed_over, give_due(runtime), settled)
    meter.observe(metrics.SWEEP_SECONDS, boottime() - began)
    for what, count in asdict(report).items():
        meter.add(metrics.SWEPT, (what,), count)
    meter.add(metrics.LEASES, ("ended",), sum(row.was_held and row.publish_count == 1 for row in swept))
    if any(asdict(report).values()):
        log.info("swept: %s", ", ".join(f"{count} {name}" for name, count in asdict(report).items() if count))
    return report


def sweep_for_beat(runtime: Runtime) -> SweepReport:
    """The sweep that beat sends for, in case workers do not sweep by themselves; looks at all schedules, too, since the
    messages that beat sends for each may be lost."""
    report = sweep(runtime)
    slots.start_due(runtime)
    heartbeat(runtime, BEAT, BEAT_SWEEP_SECONDS)
    return report


def heartbeat(runtime: Runtime, name: str, every_seconds: float, **report: Any) -> None:
    """Says that a chore has been done, and how often it should be."""
    runtime.store.run(health.record_heartbeat, name, every_seconds, report)


def _try_to_give_up(runtime: Runtime, row: Swept) -> None:
    try:
        _give_up(runtime, row)
    except FlowError as error:  # the row is due again, and the next sweep tries again
        log.warning("%s is not given up yet (%s)", row.hint.run_id, type(error).__name__)


def _give_up(runtime: Runtime, row: Swept) -> None:
    """Ends work that killed its workers too often; a step fails as lost, so that its flow may still catch it."""
    hint = row.hint
    log.error("%s %s of flow %s was lost %d times: given up", hint.kind, hint.task, hint.flow_id, row.crash_count)
    runtime.watch.meter.add(metrics.GIVEN_UP, (hint.kind,))
    if hint.kind == "drive":
        if runtime.store.run(dispatch.fail_lost, hint.flow_id, row.fence) and (flow := runtime.store.get(hint.flow_id)):
            runtime.watch.ended(flow.controller_id, flow.status)
        return
    error = of_engine(StepLost, f"its workers died {row.crash_count} times")
    failed = Completion(Holder(hint.run_id, row.fence, None), hint.flow_id, FlowStepStatus.FAILED, error=error)
    completed = runtime.store.run(dispatch.complete_step, failed)
    if completed is not None and completed.woke:
        runtime.call_worker(str(hint.flow_id))


def _hand_over_event(runtime: Runtime, event_id: str) -> int:
    try:
        key = runtime.store.run(inbox.key_of, event_id)
        handed = 0 if key is None else hand_over(runtime, key)
        runtime.store.run(inbox.drop_look, event_id)
    except FlowError as error:
        log.warning("an event is not handed over yet (%s)", type(error).__name__)
        return 0
    return handed


def prune(
    runtime: Runtime,
    retain_days: int | None = None,
    *,
    archive: Archive | None = None,
    progress: Progress | None = None,
) -> int:
    """Deletes ended flows that are past their retention, in bounded batches; says how many.

    Args:
        retain_days: how long those are kept that say nothing themselves; None: ``flow_retain_days``, and
            ``flow_retain_failed_days`` for those that failed.
        archive: is handed what is deleted, in place of the one that the application set; see :func:`pruning.prune`.
        progress: is told how many have been deleted so far, after each batch.

    Raises:
        InvalidData: for a negative number.
    """
    archive = runtime.archive if archive is None else archive
    pruned = runtime.store.play(pruning.prune(retention(runtime, retain_days), archive=archive, progress=progress))
    runtime.store.run(limits.prune)
    runtime.watch.meter.add(metrics.PRUNED, amount=pruned)
    log.info("pruned %d flows", pruned)
    heartbeat(runtime, PRUNE, DAY_SECONDS, pruned=pruned)
    return pruned


def count_prunable(runtime: Runtime, retain_days: int | None = None, *, most: int = 1_000_000) -> int:
    """How many flows :func:`prune` would delete now; it stops counting at ``most``.

    Raises:
        InvalidData: for a negative number.
    """
    return runtime.store.play(pruning.count(retention(runtime, retain_days), most))


def retention(runtime: Runtime, retain_days: int | None = None) -> Retention:
    """For how long ended flows are kept that say nothing of it; None: as is set."""
    settings = runtime.settings
    if retain_days is not None:
        return Retention(retain_days, retain_days)
    failed_days = settings.retain_failed_days
    return Retention(settings.retain_days, 3 * settings.retain_days if failed_days is None else failed_days)


def verify_sample(runtime: Runtime, size: int = 100) -> list[Finding]:
    """Audits the latest flows, as many from any time before, and those that were not whole the last time; tells in the
    log what is wrong with them."""
    sample = runtime.store.run(health.sample_ids, size, Random())
    flow_ids = list(dict.fromkeys([*sample, *torn_flows(runtime)]))
    found = audited(runtime, flow_ids)
    for finding in found[:TOLD]:
        log.error("%s", finding)
    runtime.watch.meter.add(metrics.AUDITED, amount=len(flow_ids))
    for finding in found:
        runtime.watch.meter.add(metrics.FINDINGS, (finding.kind,))
    log.info("audited %d flows: %d findings", len(flow_ids), len(found))
    torn = list(dict.fromkeys(str(finding.flow_id) for finding in found))
    heartbeat(runtime, VERIFY, HOUR_SECONDS, flows=len(flow_ids), findings=len(found), torn=torn[:TOLD])
    return found


def torn_flows(runtime: Runtime) -> list[UUID]:
    """The flows that the last audit of a sample found not to be whole; the first of them."""
    last = runtime.store.run(health.list_heartbeats).get(VERIFY)
    return [] if last is None else [UUID(flow_id) for flow_id in last.report.get("torn", [])]


def audited(runtime: Runtime, flow_ids: list[UUID]) -> list[Finding]:
    """What is wrong with these flows, but for those that were pruned meanwhile."""
    return [finding for finding in audit.verify(runtime.store, flow_ids) if finding.kind != "orphan"]
