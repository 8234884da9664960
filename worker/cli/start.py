"""``flow start``."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import click

from celery_flows.tasks.errors import FlowFailed
from celery_flows.worker import output
from celery_flows.worker.cli import shapes
from celery_flows.worker.cli.arguments import FlowName, JsonText, Moment
from celery_flows.worker.cli.command import command
from celery_flows.worker.flows import Flows


@command(prints=shapes.Started)
@click.argument("name", type=FlowName())
@click.argument("input", type=JsonText(), required=False)
@click.option("--key", help="Idempotency key: the same key again gives the flow that is there.")
@click.option("--owner", default="default", show_default=True, help="Whose flow it is.")
@click.option("--goal", default="", help="What it is for, in words.")
@click.option("--priority", type=click.IntRange(0, 255), help="Of its messages, as your broker has it.")
@click.option("--countdown", type=click.FloatRange(min=0), metavar="SECONDS", help="Begin so much later.")
@click.option("--eta", type=Moment(ago=False), help="Begin at this time, in UTC: 2026-12-31T23:59:59.")
@click.option("--wait", type=click.FloatRange(min=0), metavar="SECONDS", help="Wait for the result.")
def start(
    flows: Flows,
    name: str,
    input: Any,
    key: str | None,
    owner: str,
    goal: str,
    priority: int | None,
    countdown: float | None,
    eta: datetime | None,
    wait: float | None,
    as_json: bool,
) -> None:
    """Starts the flow NAME, and prints its id.

    INPUT is JSON, or - to read it from standard input.
    """
    handle = flows.runtime.registry.require(name).start(
        input, key=key, owner=owner, goal=goal, priority=priority, countdown=countdown, eta=eta
    )
    if wait is None:
        output.show_json({"id": handle.id}) if as_json else click.echo(handle.id)
        return
    try:
        handle.result(timeout=wait)
    except FlowFailed as failure:
        raise click.ClickException(str(failure)) from failure
    ended = handle.get()
    if as_json:
        output.show_json({"id": handle.id, "status": ended.status, "result": ended.result_json})
    else:
        click.echo(f"{handle.id} {ended.status}\n{json.dumps(ended.result_json, ensure_ascii=False)}")
