"""``flow doctor``."""

from __future__ import annotations

import json

import click

from celery_flows.worker import output
from celery_flows.worker.cli import shapes
from celery_flows.worker.cli.command import command
from celery_flows.worker.cli.settings import effective
from celery_flows.worker.doctor import examine
from celery_flows.worker.flows import Flows


@command(prints=shapes.Examined)
@click.option(
    "--stalled-after", type=click.FloatRange(min=1), default=3600.0, show_default=True, metavar="SECONDS",
    help="How long held work may record nothing.",
)  # fmt: skip
@click.option(
    "--timeout", type=click.FloatRange(0.1, 60), default=1.0, show_default=True, metavar="SECONDS",
    help="How long workers have to answer.",
)  # fmt: skip
@click.option("--settings", is_flag=True, help="Show all settings first, and where each is set; passwords are masked.")
def doctor(flows: Flows, stalled_after: float, timeout: float, settings: bool, as_json: bool) -> None:
    """Says what is not well, why, and what to do about it.

    Exit code 1 if flows do not go on, or are in danger: a check of readiness.
    """
    found = examine(flows.runtime, stalled_seconds=stalled_after, reply_seconds=timeout)
    is_ready = not any(finding.is_problem for finding in found)
    if as_json:
        told = {name: setting._asdict() for name, setting in effective(flows).items()}
        output.show_json({"ready": is_ready, "findings": [finding.as_json() for finding in found], "settings": told})
    else:
        if settings:
            rows = [(name, json.dumps(each.value), each.source) for name, each in effective(flows).items()]
            output.show_table("Settings", ("setting", "value", "from"), rows)
            click.echo()
        for finding in found:
            click.echo(str(finding))
        click.echo(f"{'ready' if is_ready else 'not ready'}, {len(found)} findings")
    if not is_ready:
        raise click.exceptions.Exit(1)
