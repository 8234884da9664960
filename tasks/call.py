"""The call of a flow's function: a plain one here, an async one in the drive's event loop."""

from __future__ import annotations

import json
from asyncio import CancelledError
from typing import TYPE_CHECKING, Any

from celery_flows.store import InvalidData
from celery_flows.tasks.run_async import AsyncRun

if TYPE_CHECKING:
    from celery_flows.tasks.registry import FlowDefinition
    from celery_flows.tasks.replay import Replay
    from celery_flows.tasks.run import Run


def call_flow(definition: FlowDefinition[Any, Any], replay: Replay, run: Run) -> Any:
    """Calls the function with the flow's input, and gives its result as JSON data.

    Raises:
        InvalidData: the input no longer fits the function, or the result cannot be JSON.
        Suspended: the flow waits, or its claim is over.
        Exception: whatever the function raises.
    """
    driver = replay.driver
    arguments = [definition.input.decode("input", driver.flow.input_json)] if definition.takes_input else []
    if definition.is_async:
        value = _run_async(definition, replay, AsyncRun(run), arguments)
    else:
        value = definition.function(run, *arguments)
    return json.loads(definition.output.encode("result", value, driver.max_payload_bytes))


def _run_async(definition: FlowDefinition[Any, Any], replay: Replay, run: AsyncRun, arguments: list[Any]) -> Any:
    async def play() -> Any:
        value = await definition.function(run, *arguments)
        replay.refuse_beside("the function's end")
        replay.refuse_forgotten()
        return value

    try:
        value = replay.driver.loop.run(play())
    except BaseException as error:
        if replay.unwound_by is not None:  # of which asyncio may have made a group, or another task's CancelledError
            raise replay.unwound_by from None
        if isinstance(error, CancelledError):
            raise InvalidData(f"flow {definition.name}", "has cancelled its own task") from error
        raise
    if replay.unwound_by is not None:  # the function caught it
        raise replay.unwound_by
    return value
