"""``flow retry`` and ``fork``: new flows that begin with what others have recorded."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import click

from celery_flows.worker import output
from celery_flows.worker.cli import shapes
from celery_flows.worker.cli.arguments import JsonText, flow_id, flow_ids
from celery_flows.worker.cli.command import command
from celery_flows.worker.cli.outcomes import Outcome, each, end, tell
from celery_flows.worker.flows import Flows


@command(prints=shapes.WentBack)
@flow_ids
def retry(flows: Flows, flow_ids: tuple[UUID, ...], as_json: bool) -> None:
    """Starts flows that go on where others failed.

    A new flow for each that failed or was cancelled. Prints the new flow's id beside the old one's. What succeeded
    is taken over; each call starts another flow.
    """
    outcomes = each(dict.fromkeys(flow_ids), lambda flow_id: str(flows.handle(flow_id).retry().id))
    _show(outcomes, "retried as", as_json)


@command(prints=shapes.WentBack)
@flow_id
@click.option(
    "--from-step", required=True, metavar="STEP",
    help="Where it goes on: a step's name, NAME#2 for the second of that name, or a run id.",
)  # fmt: skip
@click.option("--state", type=JsonText(), help="A JSON object: the state that it begins with. Default: as it was then.")
def fork(flows: Flows, flow_id: UUID, from_step: str, state: Any, as_json: bool) -> None:
    """Starts a flow that goes on from a step of another.

    It takes over what that flow has recorded before the step. That flow stays as it is, whatever its status.
    """
    forked = flows.handle(flow_id).fork(from_step=from_step, state=state)
    _show([Outcome(flow_id, str(forked.id), None)], "forked as", as_json)


def _show(outcomes: list[Outcome], what: str, as_json: bool) -> None:
    if as_json:
        told = [{"id": outcome.id, "started": outcome.done, "error": outcome.error} for outcome in outcomes]
        output.show_json({"flows": told})
    else:
        tell(outcomes, lambda outcome: f"{outcome.id} {what} {outcome.done}")
    end(outcomes)
