"""``flow stats``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from celery_flows.store import FlowStatus, health, statistics
from celery_flows.store.statistics import Statistics, Waiting
from celery_flows.worker import output
from celery_flows.worker.cli import shapes, words
from celery_flows.worker.cli.command import command
from celery_flows.worker.flows import Flows


@command(prints=shapes.Statistics)
def stats(flows: Flows, as_json: bool) -> None:
    """Counts flows, work that is due or held, and kept events.

    As quick among millions of flows as among few: beyond 10,000, numbers are estimates ("about", "over").
    """
    taken = flows.store.run(statistics.take, flows.settings.republish_max_seconds)
    chores = {name: beat.at for name, beat in sorted(flows.store.run(health.list_heartbeats).items())}
    if as_json:
        output.show_json({**_as_json(taken), "chores": chores})
        return
    rows = [[status, taken.flows[status], taken.last_hour[status]] for status in FlowStatus]
    output.show_table("Flows", ("status", "flows", "within the last hour"), rows)
    _section(f"The last {taken.recent.flows:,} flows, by definition", ("flow", *FlowStatus), [
        [name, *(counts.get(status) for status in FlowStatus)] for name, counts in taken.recent.definitions.items()
    ])  # fmt: skip
    work = taken.work
    of = f"of {len(_processes(taken))} processes" if work.workers else None
    _section("Work", ("work", "count", "about"), [
        ["due", work.due.count, _for(taken, work.due)],
        ["published, not claimed", work.published, None],
        ["held by workers", work.leases, of],
        ["queued for a slot", work.queued.count, _for(taken, work.queued)],
        ["events kept in the inbox", taken.inbox.count, _for(taken, taken.inbox)],
        ["next due", None, output.moment(work.next_due_at)],
    ])  # fmt: skip
    _section("Chores", ("chore", "last done"), [[name, output.moment(at)] for name, at in chores.items()])


def _section(title: str, columns: tuple[str, ...], rows: list[list[Any]]) -> None:
    click.echo()
    output.show_table(title, columns, rows)


def _for(taken: Statistics, waiting: Waiting) -> str | None:
    """How long the first of them has waited."""
    if waiting.since is None:
        return None
    return f"the first for {words.duration((taken.at - waiting.since).total_seconds())}"


def _processes(taken: Statistics) -> list[str]:
    return sorted({words.process(worker) for worker in taken.work.workers})


def _as_json(taken: Statistics) -> dict[str, Any]:
    told = asdict(taken)
    told["work"]["workers"] = _processes(taken)
    return told
