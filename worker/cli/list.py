"""``flow list``."""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

import click

from celery_flows.store import FlowStatus
from celery_flows.worker import output
from celery_flows.worker.cli import shapes, story
from celery_flows.worker.cli.arguments import FlowId, Moment, of_definition, of_owner, of_status, resolved
from celery_flows.worker.cli.command import command, meant
from celery_flows.worker.flows import Flows


@command(name="list", prints=shapes.Listed)
@of_status(*FlowStatus)
@of_owner
@of_definition
@click.option("--key", help="Only the flow, one of each name, that was started with this idempotency key.")
@click.option("--since", type=Moment(ago=True), help="Only flows created since then, in UTC, or so long ago: 2h.")
@click.option("--until", type=Moment(ago=True), help="Only flows created before then, in UTC, or so long ago: 2h.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most so many.")
@click.option("--after", type=FlowId(), help="The last flow of the page before.")
def list_(
    flows: Flows,
    status: str | None,
    owner: str | None,
    definition: str | None,
    key: str | None,
    since: datetime | timedelta | None,
    until: datetime | timedelta | None,
    limit: int,
    after: UUID | None,
    as_json: bool,
) -> None:
    """Lists flows, newest first, a page at a time."""
    found = flows.search(
        status=status,
        owner=owner,
        definition=definition,
        key=key,
        created_after=resolved(flows, since),
        created_before=resolved(flows, until),
        limit=limit + 1,
        after=None if after is None else flows.manager.get(after),
    )
    page, more = found[:limit], found[limit:]
    if as_json:
        output.show_json({"flows": [story.flow_json(flow) for flow in page], "next": page[-1].id if more else None})
        return
    output.show_table("", story.FLOW_COLUMNS, [story.flow_row(flow) for flow in page])
    if more:
        click.echo(f"there are more: the same command with --after {page[-1].id}", err=True)
    elif not page:
        click.echo(f"no flow fits{meant(flows, definition) if definition else ''}", err=True)
