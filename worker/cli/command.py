"""What all commands of ``flow`` have in common: the app's Flows, ``--json``, and errors that are one sentence each."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar

import click
from celery import Celery

from celery_flows.store import FlowError, InvalidData, StoreError
from celery_flows.tasks.errors import UnknownFlow
from celery_flows.worker import output
from celery_flows.worker.flows import Flows
from celery_flows.worker.lifecycle import Refused

F = TypeVar("F", bound=Callable[..., Any])


class FlowCommand(click.Command):
    """A command of ``flow``. It takes ``--json``; ``prints`` is the shape of what it prints then."""

    def __init__(self, *args: Any, prints: type, **more: Any) -> None:
        super().__init__(*args, **more)
        self.prints = prints
        self.params.append(click.Option(["--json", "as_json"], is_flag=True, help="Print JSON, for programs."))


def command(*, prints: type, name: str | None = None) -> Callable[[F], FlowCommand]:
    """Makes a command of a function, which is handed the app's Flows, and whose errors become one sentence each."""

    def make(function: F) -> FlowCommand:
        @wraps(function)
        @click.pass_context
        def run(context: click.Context, *args: Any, **options: Any) -> Any:
            app = context.obj.app
            # What the app's modules do comes first, as in a worker: one of them may be where its Flows is made.
            app.loader.import_default_modules()
            flows = Flows.of(app)
            try:
                return function(flows, *args, **options)
            except UnknownFlow as error:
                raise Refused(f"{error}{meant(flows, error.name)}{_if_no_app_was_named(context)}") from error
            except InvalidData as error:
                raise Refused(f"{error}{_if_no_app_was_named(context)}") from error
            except StoreError as error:
                raise click.ClickException(f"{error}{_where(app)}") from error
            except FlowError as error:
                raise click.ClickException(str(error)) from error

        return click.command(name, cls=FlowCommand, prints=prints)(run)

    return make


def meant(flows: Flows, name: str) -> str:
    """The registered definition that was probably meant."""
    near = get_close_matches(name, [definition.name for definition in flows.runtime.registry], n=1, cutoff=0.75)
    return f"; did you mean {near[0]!r}?" if near and near[0] != name else ""


def _where(app: Celery) -> str:
    """Which database that was, without its password."""
    url = Flows.of(app).settings.store_url
    return f" (the database is {output.masked(url)})" if url is not None else ""


def _if_no_app_was_named(context: click.Context) -> str:
    """Without -A, celery hands over an app of its own, in which nothing is registered or set."""
    return "" if context.find_root().params.get("app") else "; no app was named: celery -A APP flow …"
