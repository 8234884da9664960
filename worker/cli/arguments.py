"""What commands are given: ids, names, JSON, times."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

import click
from celery.app.utils import find_app
from click.shell_completion import CompletionItem

from celery_flows.store import FlowStatus
from celery_flows.store import operations as op
from celery_flows.worker.flows import Flows

F = TypeVar("F", bound=Callable[..., Any])


class FlowId(click.ParamType[UUID]):
    """A flow's id."""

    name = "FLOW_ID"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> UUID:
        try:
            return value if isinstance(value, UUID) else UUID(value)
        except ValueError:
            self.fail(f"{value!r} is no flow id; `flow list` shows them", param, ctx)


class FlowName(click.ParamType[str]):
    """The name of a flow definition, which a shell can complete."""

    name = "NAME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The definitions of the app that the line names so far; none, if it cannot be imported."""
        try:
            app = find_app(ctx.find_root().params["app"])
            app.loader.import_default_modules()
            names = [definition.name for definition in Flows.of(app).runtime.registry]
        except Exception:  # whatever the app's modules raise: a shell asks, and there is nobody to tell
            return []
        return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


class JsonText(click.ParamType[Any]):
    """A JSON document on the command line; ``-`` stands for standard input."""

    name = "JSON"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(sys.stdin.read() if value == "-" else value)
        except ValueError as error:
            self.fail(f"is no JSON ({error}); a string needs its quotes: '\"text\"'", param, ctx)


AGO = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


class Moment(click.ParamType["datetime | timedelta"]):
    """A time, in UTC unless it says otherwise; where ``ago``, or how long ago that was."""

    name = "TIME"

    def __init__(self, *, ago: bool) -> None:
        self._ago = ago

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime | timedelta:
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        try:
            if self._ago and (found := AGO.fullmatch(value)):
                return timedelta(**{UNITS[found[2]]: float(found[1])})
            at = datetime.fromisoformat(value)
            return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
        except (ValueError, OverflowError):
            ago = ", or how long ago: 90s, 15m, 2h, 3d" if self._ago else ""
            self.fail(f"{value!r} is no time; write 2026-12-31T23:59:59, in UTC{ago}", param, ctx)


def resolved(flows: Flows, moment: datetime | timedelta | None) -> datetime | None:
    """The time that is meant, by the database's clock."""
    if not isinstance(moment, timedelta):
        return moment
    at: datetime = flows.store.run(op.now)
    try:
        return at - moment
    except OverflowError:
        return datetime.min.replace(tzinfo=UTC)


flow_id = click.argument("flow_id", type=FlowId())
flow_ids = click.argument("flow_ids", type=FlowId(), nargs=-1, required=True)
payloads = click.option(
    "--payloads", is_flag=True, help="Show input, state, results and what events carry, which may be confidential."
)
of_owner = click.option("--owner", help="Only this owner's.")
of_definition = click.option("--flow", "definition", type=FlowName(), help="Only flows of this name.")


def of_status(*statuses: FlowStatus) -> Callable[[F], F]:
    """An option for flows in one of these statuses."""
    return click.option("--status", type=click.Choice([status.value for status in statuses]), help="Only these.")


def say_yes(what: str) -> Callable[[F], F]:
    """An option that does without the question."""
    return click.option("--yes", is_flag=True, help=f"Do not ask before {what}.")
