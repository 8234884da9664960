"""``flow cancel``: flows that are named, or all open ones that fit."""

from __future__ import annotations

from functools import partial
from uuid import UUID

import click

from celery_flows.store import FlowStatus
from celery_flows.store.models import OPEN
from celery_flows.worker import output
from celery_flows.worker.cli import shapes
from celery_flows.worker.cli.arguments import FlowId, of_definition, of_owner, of_status, say_yes
from celery_flows.worker.cli.command import command
from celery_flows.worker.cli.confirm import confirm
from celery_flows.worker.cli.outcomes import each, end, tell
from celery_flows.worker.cli.progress import progress
from celery_flows.worker.flows import Flows
from celery_flows.worker.lifecycle import Refused

MOST = 10_000  # flows that one command cancels


@command(prints=shapes.Steered)
@click.argument("flow_ids", type=FlowId(), nargs=-1)
@of_status(*sorted(OPEN))
@of_owner
@of_definition
@click.option(
    "--now", is_flag=True, help="Ends them at once, without their cleanup: for those that no code fits any more."
)
@say_yes("cancelling more than one, or by options")
def cancel(
    flows: Flows,
    flow_ids: tuple[UUID, ...],
    status: str | None,
    owner: str | None,
    definition: str | None,
    now: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Asks flows to cancel. Each cleans up first.

    Those that are named, or all open ones that fit the options: 10,000 at most.
    """
    by_filter = any((status, owner, definition))
    if bool(flow_ids) == by_filter:
        raise Refused("name flows by their ids, or say which by --status, --owner and --flow: one of the two")
    wanted = list(dict.fromkeys(flow_ids)) or _fitting(flows, status, owner, definition)
    if len(wanted) > 1 or (by_filter and wanted):
        most = ", the most that one command does" if len(wanted) == MOST else ""
        what = (
            f"cancels {len(wanted):,} flows without their cleanup" if now else f"asks {len(wanted):,} flows to cancel"
        )
        confirm(f"This {what}{most}", yes=yes)
    with progress("cancelling", len(wanted)) as told:
        outcomes = each(wanted, partial(_cancel if now else _ask, flows), told)
    if as_json:
        output.show_json({"flows": [outcome._asdict() for outcome in outcomes]})
    else:
        tell(outcomes)
        if not wanted:
            click.echo("no open flow fits", err=True)
    end(outcomes)


def _ask(flows: Flows, flow_id: UUID) -> str:
    flows.handle(flow_id).cancel()
    return "cancel requested"


def _cancel(flows: Flows, flow_id: UUID) -> str:
    flows.manager.cancel(flow_id)
    return "cancelled"


def _fitting(flows: Flows, status: str | None, owner: str | None, definition: str | None) -> list[UUID]:
    """The open flows that fit and are not to be cancelled yet; at most so many."""
    found: list[UUID] = []
    for each_status in [FlowStatus(status)] if status else sorted(OPEN):
        after = None
        while len(found) < MOST:
            page = flows.search(status=each_status, owner=owner, definition=definition, limit=500, after=after)
            found += [flow.id for flow in page if not flow.cancel_requested]
            if len(page) < 500:
                break
            after = page[-1]
    return found[:MOST]
