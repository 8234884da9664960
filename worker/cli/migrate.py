"""``flow migrate``."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import click
from alembic.util import CommandError

from celery_flows.store import schema
from celery_flows.store.engines import make_engine
from celery_flows.worker import output
from celery_flows.worker.cli import shapes
from celery_flows.worker.cli.arguments import say_yes
from celery_flows.worker.cli.command import command
from celery_flows.worker.cli.confirm import confirm
from celery_flows.worker.flows import Flows
from celery_flows.worker.lifecycle import Refused


@command(prints=shapes.Migrated)
@click.option("--to", "revision", default="head", show_default=True, help="Schema version; base takes the tables away.")
@say_yes("taking tables away")
def migrate(flows: Flows, revision: str, yes: bool, as_json: bool) -> None:
    """Brings the database's schema up to date. Harmless to repeat, and to run from two places at once."""
    engine = make_engine(flows.settings.require_store_url())
    if revision == "base":
        confirm("--to base deletes all flows and their history", yes=yes)
    was = schema.at(engine)
    with _spinner(f"migrating from {was or 'no tables'} to {revision}"):
        if revision == "base":
            schema.downgrade(engine, revision)
        else:
            try:
                schema.upgrade(engine, revision)
            except CommandError as error:
                raise Refused(
                    f"--to: there is no schema version {revision!r}; the newest is {schema.head()}"
                ) from error
    now = schema.at(engine)
    if was == now and revision not in ("head", "base", now):
        raise Refused(f"--to: the database is at schema version {now}, past {revision}; only base goes back")
    output.show_json({"was": was, "schema": now}) if as_json else click.echo(f"schema: {now or 'no tables'}")


def _spinner(what: str) -> AbstractContextManager[object]:
    """It is one transaction, of which nobody knows how far it has come."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(what)
