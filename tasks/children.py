"""Child flows: a flow as a step of another, and what is done in either one's name when the other ends."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import UUID

from celery_flows.store import AlreadyTerminal, Flow, FlowError, FlowNotFound, InvalidData, children
from celery_flows.store.changes import Member
from celery_flows.store.validation import check_name, encode_json

if TYPE_CHECKING:
    from celery_flows.tasks.registry import FlowDefinition
    from celery_flows.tasks.replay import Place
    from celery_flows.tasks.runtime import Runtime

log = logging.getLogger("celery_flows.children")

Out = TypeVar("Out")

DEEPEST = 100  # flows one below the other: what goes deeper calls itself without end


@dataclass(frozen=True, slots=True)
class ChildFlow(Generic[Out]):
    """A flow to be run as a step of another. Make one with ``definition.s(input)``."""

    definition: FlowDefinition[Any, Out]
    input: Any


def child_member(
    parent: Flow, place: Place, child: ChildFlow[Any], deadline: datetime | None, *, cleanup: bool
) -> Member:
    """The rows of a child flow: its parent's owner is its own, and its deadline the one that is given.

    Raises:
        InvalidData: the input is not what it takes, or cannot be JSON.
    """
    definition = child.definition
    flow = definition.new_flow(
        owner_session_key=parent.owner_session_key,
        parent_flow_id=parent.id,
        input_json=definition.encoded_input(child.input),
        deadline_at=deadline,
        trace_json=definition._runtime.watch.spans.carrier(),
    )
    args = encode_json("child", {**place.kept(), "cleanup": True} if cleanup else place.kept())
    name = check_name("step", definition.name)
    return Member(
        place.run_id, name, place.position, args, definition.queue, definition.priority, child=flow,
        limit_key=definition.limit_key(flow.input_json),
    )  # fmt: skip


def check_depth(lineage: tuple[str, ...], name: str) -> None:
    """Says nothing if the flow of this lineage, its own name last, may have a child of this name.

    Raises:
        InvalidData: it lies too deep; naming the end of the chain.
    """
    if len(lineage) >= DEEPEST:
        chain = " > ".join((*lineage[-3:], name))
        raise InvalidData(f"child flow {name}", f"lies more than {DEEPEST} flows deep (… > {chain}); end the recursion")


def cancel_child(runtime: Runtime, flow_id: UUID) -> None:
    """Asks a child to cancel, and calls its driver; one that has ended is left alone."""
    with suppress(AlreadyTerminal, FlowNotFound):
        runtime.manager.request_cancel(flow_id)
        runtime.call_worker(str(flow_id))


def settle_child(runtime: Runtime, run_id: str) -> bool:
    """Sees to a due row of a child: closes its parent's step, or carries out the order to cancel it. Never raises: the
    row stays due for the next sweep."""
    try:
        return _cancel(runtime, run_id) if children.is_order(run_id) else _close(runtime, run_id)
    except FlowError as error:
        log.warning("child %s is not settled yet (%s)", run_id, type(error).__name__)
        return False


def _cancel(runtime: Runtime, run_id: str) -> bool:
    child_id = runtime.store.run(children.child_to_cancel, run_id)
    if child_id is None:
        return False
    cancel_child(runtime, child_id)
    runtime.store.run(children.drop_order, run_id)
    return True


def _close(runtime: Runtime, run_id: str) -> bool:
    settled = runtime.store.run(children.settle_child, run_id)
    if settled is not None and settled.woke:
        runtime.call_worker(str(settled.flow_id))
    return settled is not None
