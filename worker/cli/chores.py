"""``flow sweep``, ``prune`` and ``verify``: the chores, done by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import click

from celery_flows.store import audit, statistics
from celery_flows.store.statistics import Count
from celery_flows.tasks import maintenance
from celery_flows.tasks.archive import JsonLinesFile
from celery_flows.worker import output
from celery_flows.worker.cli import shapes
from celery_flows.worker.cli.arguments import FlowId, Moment, resolved, say_yes
from celery_flows.worker.cli.command import command
from celery_flows.worker.cli.confirm import confirm
from celery_flows.worker.cli.progress import progress
from celery_flows.worker.flows import Flows


@command(prints=shapes.Swept)
def sweep(flows: Flows, as_json: bool) -> None:
    """Looks once for due work, as workers do all the time."""
    counts = asdict(maintenance.sweep(flows.runtime))
    output.show_json(counts) if as_json else output.show_table("", list(counts), [list(counts.values())])


@command(prints=shapes.Pruned)
@click.option(
    "--retain-days", type=click.IntRange(0, 36_500),
    help="Of all that say nothing themselves. Default: as is set, for longer if they failed.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Delete nothing; count what would go, up to 10,000.")
@click.option(
    "--archive", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Append what is deleted to this file first, a line of JSON for each flow.",
)  # fmt: skip
@say_yes("deleting")
def prune(flows: Flows, retain_days: int | None, dry_run: bool, archive: Path | None, yes: bool, as_json: bool) -> None:
    """Deletes ended flows that are past their retention.

    Their steps and events go with them.
    """
    count = None if yes and not dry_run else _prunable(flows, retain_days)
    told: dict[str, Any] = {"pruned": 0}
    if dry_run:
        told["would_prune"] = asdict(count) if count else None
        line = f"{count} flows would be pruned"
    else:
        is_nothing = count is not None and count.number == 0 and sys.stdin.isatty()  # a script is to say it always
        what = f"This deletes {count} flows that are past their retention, with their histories"
        confirm(what, yes=yes or is_nothing)
        total = count.number if count is not None and count.precision == "exact" else None
        kept = None if archive is None else JsonLinesFile(archive)
        try:
            with progress("pruning", total) as progressed:
                told["pruned"] = maintenance.prune(flows.runtime, retain_days, archive=kept, progress=progressed)
        except OSError as error:
            at = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(f"the archive could not be written ({at}{error.strerror or error})") from error
        line = f"{told['pruned']} flows pruned"
    output.show_json(told) if as_json else click.echo(line)


def _prunable(flows: Flows, retain_days: int | None) -> Count:
    """How many would go, as far as it is worth counting before one is asked."""
    number = maintenance.count_prunable(flows.runtime, retain_days, most=statistics.BOUND + 1)
    return Count(number) if number <= statistics.BOUND else Count(statistics.BOUND, "at least")


@command(prints=shapes.Verified)
@click.argument("flow_ids", type=FlowId(), nargs=-1)
@click.option("--since", type=Moment(ago=True), help="Only flows updated since then, in UTC, or so long ago: 2h.")
def verify(flows: Flows, flow_ids: tuple[UUID, ...], since: datetime | timedelta | None, as_json: bool) -> None:
    """Proves that histories are whole.

    Folds each flow's events and compares with its rows; those named, or all. Exit code 1 if anything is not as it
    must be.
    """
    looked_at = 0

    def counted(tell: Callable[[int], None]) -> Callable[[int], None]:
        def count(number: int) -> None:
            nonlocal looked_at
            looked_at = number
            tell(number)

        return count

    found = []
    with progress("verifying", _total(flows, flow_ids, since)) as told:
        after = resolved(flows, since)
        for finding in audit.verify(flows.store, list(flow_ids) or None, since=after, progress=counted(told)):
            found.append(finding)
            if not as_json:
                click.echo(str(finding))
    if as_json:
        findings = [{"flow_id": f.flow_id, "kind": f.kind, "about": f.about} for f in found]
        output.show_json({"flows": looked_at, "findings": findings})
    else:
        click.echo(f"{looked_at} flows, {len(found)} findings")
    if found:
        raise click.exceptions.Exit(1)


def _total(flows: Flows, flow_ids: tuple[UUID, ...], since: object) -> int | None:
    """How many flows there are to look at, if that is known, or can be guessed."""
    if flow_ids:
        return len(flow_ids)
    count = None if since is not None else flows.store.run(statistics.count_flows)
    return None if count is None or count.precision == "at least" else count.number
