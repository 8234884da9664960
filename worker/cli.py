"""``celery -A APP flow …``: the operator's commands, found by Celery through an entry point.

Exit codes: 0 done; 1 it could not be done (no such flow, database out of reach, schema outdated); 2 the command was
wrong (unknown flow definition, input that is no JSON or of the wrong type, a bad setting).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps
from typing import Any, TypeVar
from uuid import UUID

import click
from alembic.util import CommandError
from celery import Celery

from celery_flows.store import FlowError, FlowStatus, InvalidData, StoreError, audit, limits, schema
from celery_flows.store.engines import make_engine
from celery_flows.tasks import maintenance
from celery_flows.tasks.errors import FlowFailed, UnknownFlow
from celery_flows.worker import output
from celery_flows.worker.doctor import examine
from celery_flows.worker.flows import Flows
from celery_flows.worker.lifecycle import Refused

F = TypeVar("F", bound=Callable[..., Any])


@click.group(name="flow")
def flow() -> None:
    """Durable flows: start, watch and steer them.

    They are those of the app that is named to celery itself:

    \b
    celery -A APP flow COMMAND
    """


def _command(function: F) -> F:
    """A command that is handed the app's Flows, and whose errors are one sentence each."""

    @wraps(function)
    @click.pass_context
    def run(context: click.Context, *args: Any, **options: Any) -> Any:
        app = context.obj.app
        # What the app's modules do comes first, as in a worker: one of them may be where its Flows is made.
        app.loader.import_default_modules()
        try:
            return function(Flows.of(app), *args, **options)
        except (InvalidData, UnknownFlow) as error:
            raise Refused(f"{error}{_if_no_app_was_named(context)}") from error
        except StoreError as error:
            raise click.ClickException(f"{error}{_where(app)}") from error
        except FlowError as error:
            raise click.ClickException(str(error)) from error

    return run  # type: ignore[return-value]


def _where(app: Celery) -> str:
    """Which database that was, without its password."""
    url = Flows.of(app).settings.store_url
    return f" (the database is {output.masked(url)})" if url is not None else ""


def _if_no_app_was_named(context: click.Context) -> str:
    """Without -A, celery hands over an app of its own, in which nothing is registered or set."""
    return "" if context.find_root().params.get("app") else "; no app was named: celery -A APP flow …"


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


class FlowId(click.ParamType[UUID]):
    """A flow's id."""

    name = "FLOW_ID"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> UUID:
        try:
            return value if isinstance(value, UUID) else UUID(value)
        except ValueError:
            self.fail(f"{value!r} is no flow id; `flow list` shows them", param, ctx)


class JsonText(click.ParamType[Any]):
    """A JSON document on the command line."""

    name = "JSON"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(f"is no JSON ({error}); a string needs its quotes: '\"text\"'", param, ctx)


flow_id = click.argument("flow_id", type=FlowId())


@flow.command()
@click.option("--to", "revision", default="head", show_default=True, help="Schema version; base takes the tables away.")
@click.option("--yes", is_flag=True, help="Do not ask before taking tables away.")
@_command
def migrate(flows: Flows, revision: str, yes: bool) -> None:
    """Brings the database's schema up to date. Harmless to repeat, and to run from two places at once."""
    engine = make_engine(flows.settings.require_store_url())
    if revision == "base":
        if not yes and not sys.stdin.isatty():
            raise Refused("--to base deletes all flows and their history: say --yes, too")
        if not yes:
            click.confirm("This deletes all flows and their history. Go on?", abort=True)
        schema.downgrade(engine, revision)
    else:
        try:
            schema.upgrade(engine, revision)
        except CommandError as error:
            raise Refused(f"--to: there is no schema version {revision!r}; the newest is {schema.head()}") from error
    click.echo(f"schema: {schema.at(engine) or 'no tables'}")


@flow.command()
@click.argument("name")
@click.argument("input", type=JsonText(), required=False)
@click.option("--key", help="Idempotency key: the same key again gives the flow that is there.")
@click.option("--owner", default="default", show_default=True, help="Whose flow it is.")
@click.option("--goal", default="", help="What it is for, in words.")
@click.option("--wait", type=click.FloatRange(min=0), metavar="SECONDS", help="Wait for the result.")
@as_json
@_command
def start(
    flows: Flows, name: str, input: Any, key: str | None, owner: str, goal: str, wait: float | None, as_json: bool
) -> None:
    """Starts the flow NAME with INPUT (JSON), and prints its id."""
    handle = flows.runtime.registry.require(name).start(input, key=key, owner=owner, goal=goal)
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


def _utc(moment: datetime | None) -> datetime | None:
    return None if moment is None else moment.replace(tzinfo=UTC)


@flow.command(name="list")
@click.option("--status", type=click.Choice([status.value for status in FlowStatus]), help="Only these.")
@click.option("--owner", help="Only this owner's.")
@click.option("--flow", "definition", help="Only flows of this name.")
@click.option("--key", help="Only the flow, one of each name, that was started with this idempotency key.")
@click.option("--since", type=click.DateTime(), help="Only flows created since then, in UTC.")
@click.option("--until", type=click.DateTime(), help="Only flows created before then, in UTC.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most so many.")
@click.option("--after", type=FlowId(), help="The last flow of the page before.")
@as_json
@_command
def list_(
    flows: Flows,
    status: str | None,
    owner: str | None,
    definition: str | None,
    key: str | None,
    since: datetime | None,
    until: datetime | None,
    limit: int,
    after: UUID | None,
    as_json: bool,
) -> None:
    """Lists flows, newest first."""
    found = flows.search(
        status=status,
        owner=owner,
        definition=definition,
        key=key,
        created_after=_utc(since),
        created_before=_utc(until),
        limit=limit,
        after=None if after is None else flows.manager.get(after),
    )
    if as_json:
        output.show_json([row.model_dump(mode="json") for row in found])
    else:
        output.show_table("", output.FLOW_COLUMNS, [output.flow_row(row) for row in found])


@flow.command()
@flow_id
@click.option("--events", type=click.IntRange(0), default=100, show_default=True, help="How many of the last events.")
@as_json
@_command
def show(flows: Flows, flow_id: UUID, events: int, as_json: bool) -> None:
    """Shows a flow: what it is, its steps, its history."""
    found = flows.manager.get(flow_id)
    steps = flows.store.list_steps(flow_id)
    history = flows.store.list_events(flow_id, events)[::-1]
    queued_at = flows.store.run(limits.queued_since, flow_id)
    if as_json:
        output.show_json(
            {
                "flow": found.model_dump(mode="json"),
                "steps": [step.model_dump(mode="json") for step in steps],
                "events": [event.model_dump(mode="json") for event in history],
                "queued_at": queued_at,
            }
        )
    else:
        output.show_flow(found, steps, history, queued_at)


@flow.command()
@flow_id
@click.option("--now", is_flag=True, help="Ends it at once, without its cleanup: for one that no code fits any more.")
@_command
def cancel(flows: Flows, flow_id: UUID, now: bool) -> None:
    """Asks a flow to cancel. It cleans up first."""
    if now:
        flows.manager.cancel(flow_id)
        click.echo(f"{flow_id} cancelled")
    else:
        flows.handle(flow_id).cancel()
        click.echo(f"{flow_id} cancel requested")


@flow.command()
@flow_id
@click.option("--patch", type=JsonText(), help="A JSON object, merged into the flow's state.")
@_command
def resume(flows: Flows, flow_id: UUID, patch: Any) -> None:
    """Resumes a flow that waits."""
    if patch is not None and not isinstance(patch, dict):
        raise InvalidData("--patch", "must be a JSON object")
    flows.handle(flow_id).resume(patch)
    click.echo(f"{flow_id} resumed")


@flow.command()
@click.argument("topic")
@click.argument("correlation_id")
@click.argument("payload", type=JsonText(), required=False)
@_command
def emit(flows: Flows, topic: str, correlation_id: str, payload: Any) -> None:
    """Tells of an external event; PAYLOAD is JSON. Kept until a flow waits for it."""
    click.echo(f"{flows.emit(topic, correlation_id, payload)} emitted")


@flow.command()
@as_json
@_command
def sweep(flows: Flows, as_json: bool) -> None:
    """Looks once for due work, as workers and beat do all the time."""
    report = maintenance.sweep(flows.runtime)
    counts = {name: getattr(report, name) for name in report.__slots__}
    output.show_json(counts) if as_json else output.show_table("", list(counts), [list(counts.values())])


@flow.command()
@click.option("--retain-days", type=click.IntRange(0, 36_500), help="Default: flow_retain_days.")
@_command
def prune(flows: Flows, retain_days: int | None) -> None:
    """Deletes ended flows that are past their retention."""
    click.echo(f"{maintenance.prune(flows.runtime, retain_days)} flows pruned")


@flow.command()
@click.argument("flow_ids", type=FlowId(), nargs=-1)
@click.option("--since", type=click.DateTime(), help="Only flows updated since then, in UTC.")
@as_json
@_command
def verify(flows: Flows, flow_ids: tuple[UUID, ...], since: datetime | None, as_json: bool) -> None:
    """Proves that histories are whole: folds each flow's events and compares with its rows.

    Exit code 1 if anything is not as it must be.
    """
    looked_at = 0

    def progress(number: int) -> None:
        nonlocal looked_at
        looked_at = number

    found = []
    for finding in audit.verify(flows.store, list(flow_ids) or None, since=_utc(since), progress=progress):
        found.append(finding)
        if not as_json:
            click.echo(str(finding))
    if as_json:
        told = [{"flow_id": f.flow_id, "kind": f.kind, "about": f.about} for f in found]
        output.show_json({"flows": looked_at, "findings": told})
    else:
        click.echo(f"{looked_at} flows, {len(found)} findings")
    if found:
        raise click.exceptions.Exit(1)


@flow.command()
@click.option(
    "--stalled-after", type=click.FloatRange(min=1), default=3600.0, show_default=True, metavar="SECONDS",
    help="How long held work may record nothing.",
)  # fmt: skip
@click.option(
    "--timeout", type=click.FloatRange(0.1, 60), default=1.0, show_default=True, metavar="SECONDS",
    help="How long workers have to answer.",
)  # fmt: skip
@as_json
@_command
def doctor(flows: Flows, stalled_after: float, timeout: float, as_json: bool) -> None:
    """Says what is not well, why, and what to do about it.

    Exit code 1 if flows do not go on, or are in danger: a check of readiness.
    """
    found = examine(flows.runtime, stalled_seconds=stalled_after, reply_seconds=timeout)
    is_ready = not any(finding.is_problem for finding in found)
    if as_json:
        output.show_json({"ready": is_ready, "findings": [finding.as_json() for finding in found]})
    else:
        for finding in found:
            click.echo(str(finding))
        click.echo(f"{'ready' if is_ready else 'not ready'}, {len(found)} findings")
    if not is_ready:
        raise click.exceptions.Exit(1)
