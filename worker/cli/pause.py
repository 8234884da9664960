"""``flow pause``, ``unpause`` and ``resume``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

import click

from celery_flows.store import InvalidData
from celery_flows.worker import output
from celery_flows.worker.cli import shapes, words
from celery_flows.worker.cli.arguments import JsonText, flow_ids
from celery_flows.worker.cli.command import command
from celery_flows.worker.cli.outcomes import each, end, tell
from celery_flows.worker.flows import Flows


@command(prints=shapes.Steered)
@flow_ids
def pause(flows: Flows, flow_ids: tuple[UUID, ...], as_json: bool) -> None:
    """Keeps workers from going on with flows.

    The step in hand is done; timers and deadlines wait, too.
    """

    def act(flow_id: UUID) -> str:
        if flows.manager.get(flow_id).paused_at is not None:
            return "is paused already"
        flows.handle(flow_id).pause()
        return "paused"

    _steer(flow_ids, act, as_json)


@command(prints=shapes.Steered)
@flow_ids
def unpause(flows: Flows, flow_ids: tuple[UUID, ...], as_json: bool) -> None:
    """Lets workers go on with paused flows."""

    def act(flow_id: UUID) -> str:
        if flows.manager.get(flow_id).paused_at is None:
            return "is not paused"
        return _unpause(flows, flow_id)

    _steer(flow_ids, act, as_json)


@command(prints=shapes.Steered)
@flow_ids
@click.option(
    "--patch", type=JsonText(),
    help="A JSON object: what the wait gives; merged into the state of a flow that no definition drives.",
)  # fmt: skip
def resume(flows: Flows, flow_ids: tuple[UUID, ...], patch: Any, as_json: bool) -> None:
    """Lets flows go on: ends a wait, or unpauses.

    One that waits goes on as if what it waits for had come. A paused flow that waits is unpaused, and waits on:
    resume it once more to end its wait.
    """
    if patch is not None and not isinstance(patch, dict):
        raise InvalidData("--patch", "must be a JSON object")

    def act(flow_id: UUID) -> str:
        if flows.manager.get(flow_id).paused_at is None:
            flows.handle(flow_id).resume(patch)
            return "resumed"
        if patch is not None:
            raise InvalidData("--patch", f"is for a wait, and flow {flow_id} is paused: unpause it first")
        return _unpause(flows, flow_id)

    _steer(flow_ids, act, as_json)


def _unpause(flows: Flows, flow_id: UUID) -> str:
    handle = flows.handle(flow_id)
    handle.unpause()
    wait = handle.get().wait_json
    return f"unpaused; it still waits for {words.describe_wait(wait)}" if wait else "unpaused"


def _steer(flow_ids: tuple[UUID, ...], act: Callable[[UUID], str], as_json: bool) -> None:
    outcomes = each(dict.fromkeys(flow_ids), act)
    if as_json:
        output.show_json({"flows": [outcome._asdict() for outcome in outcomes]})
    else:
        tell(outcomes)
    end(outcomes)
