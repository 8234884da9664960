"""``flow emit`` and ``approve``: what flows are told from outside."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import click

from celery_flows.store import views
from celery_flows.tasks.approval import TOPIC, approval_key
from celery_flows.worker import output
from celery_flows.worker.cli import shapes
from celery_flows.worker.cli.arguments import JsonText, flow_id
from celery_flows.worker.cli.command import command
from celery_flows.worker.flows import Flows


@command(prints=shapes.Emitted)
@click.argument("topic")
@click.argument("correlation_id")
@click.argument("payload", type=JsonText(), required=False)
def emit(flows: Flows, topic: str, correlation_id: str, payload: Any, as_json: bool) -> None:
    """Tells of an external event, for a flow that waits for it.

    PAYLOAD is JSON, or - to read it from standard input. It goes to the flow that has waited longest for it; if
    none waits, it is kept until one does.
    """
    event_id = flows.emit(topic, correlation_id, payload)
    kept = flows.store.run(views.has_kept_event, topic, correlation_id)
    if as_json:
        output.show_json({"id": event_id, "kept": kept})
        return
    click.echo(f"{event_id} emitted")
    if kept:
        click.echo("no flow waits for it yet: it is kept until one does", err=True)


@command(prints=shapes.Approved)
@flow_id
@click.argument("name")
@click.option("--by", required=True, help="Who decides.")
@click.option("--refuse", is_flag=True, help="Refuse it, instead of granting it.")
@click.option("--comment", default="", help="In words, for the flow and its history.")
def approve(flows: Flows, flow_id: UUID, name: str, by: str, refuse: bool, comment: str, as_json: bool) -> None:
    """Grants or refuses the approval NAME of a flow.

    One that comes before the flow asks is kept until it does.
    """
    handle = flows.handle(flow_id)
    decide = handle.reject if refuse else handle.approve
    asked = _asked(handle.get().wait_json)
    decide(name, by=by, comment=comment)
    kept = flows.store.run(views.has_kept_event, *approval_key(flow_id, name))
    if as_json:
        output.show_json({"id": flow_id, "approval": name, "granted": not refuse, "kept": kept})
        return
    click.echo(f"{flow_id} {name!r} {'refused' if refuse else 'granted'}")
    if kept:
        now = f"; now it asks for {asked!r}" if asked else ""
        click.echo(f"the flow does not ask for {name!r} yet: it is kept until it does{now}", err=True)


def _asked(wait: dict[str, Any] | None) -> str | None:
    """The approval that a flow waits for."""
    topic = (wait or {}).get("topic", "")
    return topic.removeprefix(f"{TOPIC} ") if topic.startswith(f"{TOPIC} ") else None
