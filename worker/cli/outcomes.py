"""The same done to many flows, one after another: what came of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple
from uuid import UUID

import click

from celery_flows.store import FlowError, StoreError
from celery_flows.tasks.errors import UnknownFlow


class Outcome(NamedTuple):
    """What came of one: what was done, or why it could not be."""

    id: UUID
    done: str | None
    error: str | None


def each(
    flow_ids: Iterable[UUID], act: Callable[[UUID], str], progress: Callable[[int], object] = lambda _: None
) -> list[Outcome]:
    """Does it to all, whatever comes of one; ``progress`` is told how many are done.

    Raises:
        StoreError, UnknownFlow: what would hold for the others as well.
    """
    outcomes: list[Outcome] = []
    for flow_id in flow_ids:
        try:
            outcomes.append(Outcome(flow_id, act(flow_id), None))
        except (StoreError, UnknownFlow):
            raise
        except FlowError as error:
            outcomes.append(Outcome(flow_id, None, str(error)))
        progress(len(outcomes))
    return outcomes


def tell(
    outcomes: list[Outcome], line: Callable[[Outcome], str] = lambda outcome: f"{outcome.id} {outcome.done}"
) -> None:
    """A line for each on standard output, or, of what could not be done, on standard error."""
    for outcome in outcomes:
        if outcome.error is None:
            click.echo(line(outcome))
        else:
            click.echo(f"Error: {outcome.error}", err=True)


def end(outcomes: list[Outcome]) -> None:
    """Exit code 1, if something could not be done."""
    if any(outcome.error is not None for outcome in outcomes):
        raise click.exceptions.Exit(1)
