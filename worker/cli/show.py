"""``flow show``."""

from __future__ import annotations

from uuid import UUID

import click

from celery_flows.store import limits, views
from celery_flows.store import operations as op
from celery_flows.worker import output
from celery_flows.worker.cli import shapes, story
from celery_flows.worker.cli.arguments import flow_id, payloads
from celery_flows.worker.cli.command import command
from celery_flows.worker.flows import Flows

SHOWN = 100  # children, and things that may need a worker


@command(prints=shapes.Shown)
@flow_id
@click.option(
    "--steps", type=click.IntRange(0, 10_000), default=100, show_default=True, help="How many of the last steps."
)
@click.option(
    "--events", type=click.IntRange(0, 10_000), default=100, show_default=True, help="How many of the last events."
)
@payloads
def show(flows: Flows, flow_id: UUID, steps: int, events: int, payloads: bool, as_json: bool) -> None:
    """Shows a flow: what it waits for, its steps, its history.

    Also who is at work on it, and its children.
    """
    found = flows.manager.get(flow_id)
    last_steps = flows.store.run(views.list_last_steps, flow_id, steps)
    history = flows.store.list_events(flow_id, events)[::-1]
    queued_at = flows.store.run(limits.queued_since, flow_id)
    work = flows.store.run(views.list_dispatched, flow_id, SHOWN)
    children = flows.store.run(views.list_children, flow_id, SHOWN)
    counts = flows.store.run(op.count_steps, flow_id)
    now, queue = flows.store.run(op.now), flows.runtime.default_queue()
    names = flows.store.run(views.name_steps, history)
    told = [(event, names.get(event.id)) for event in history]
    if as_json:
        output.show_json(
            {
                "flow": story.flow_json(found, payloads=payloads),
                "steps": [story.step_json(step, payloads=payloads) for step in last_steps],
                "step_counts": counts,
                "work": [story.work_json(each, queue) for each in work],
                "children": [story.flow_json(child) for child in children],
                "events": [story.event_json(event, step, payloads=payloads) for event, step in told],
                "queued_at": queued_at,
            }
        )
        return
    output.show_table(str(found.id), ("what", "is"), story.facts(found, queued_at, payloads=payloads))
    total = sum(counts.values())
    title = _some("Steps", len(last_steps), total)
    if total > len(last_steps):
        title += f": {', '.join(f'{count} {status}' for status, count in sorted(counts.items()))}"
    _section(title, story.STEP_COLUMNS, [story.step_row(step, now) for step in last_steps])
    if work:
        is_paused = found.paused_at is not None
        title = "Work" if len(work) < SHOWN else f"Work, the first {SHOWN}"
        _section(title, story.WORK_COLUMNS, story.work_rows(work, queue, now, is_paused=is_paused))
    if children:
        title = "Children" if len(children) < SHOWN else f"Children, the first {SHOWN}"
        _section(title, story.FLOW_COLUMNS, [story.flow_row(child) for child in children])
    _section("History", story.EVENT_COLUMNS, [story.event_row(event, step) for event, step in told])
    if events and len(history) == events and history[0].kind != "created":
        click.echo("there is more before that: --events shows it", err=True)


def _section(title: str, columns: tuple[str, ...], rows: list[list[object]]) -> None:
    click.echo()
    output.show_table(title, columns, rows)


def _some(title: str, shown: int, total: int) -> str:
    return title if shown == total else f"{title}, the last {shown} of {total:,}"
