"""Which tasks a canvas will run, as far as it says so beforehand. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

HEADER = "flow_mirror"  # of a message: the id of the mirrored flow that its task belongs to


@dataclass(frozen=True, slots=True)
class Planned:
    """A task whose id is known before it runs."""

    run_id: str
    task: str
    is_first: bool  # published with the canvas; else by a task of it


CONTAINERS = frozenset({"chain", "group", "chord"})


def planned(canvas: Mapping[str, Any], is_first: bool = False) -> Iterator[Planned]:
    """The tasks of a frozen canvas, or of what a message carries of one. What has no id yet is left out: callbacks
    (``link``), which have theirs made when they are published."""
    for node, first in _nodes(canvas, is_first):
        run_id = node["options"].get("task_id")
        if node.get("subtask_type") not in CONTAINERS and run_id is not None:
            yield Planned(run_id, node["task"], first)


def mark(canvas: Mapping[str, Any], flow_id: str) -> None:
    """Has the messages of a frozen canvas say which mirrored flow they belong to; that is their root, too."""
    for node, _ in _nodes(canvas, True):
        options = node["options"]
        if node.get("subtask_type") == "chain":
            options.pop("task_id", None)  # its last task's, which has it; run eagerly, all of them would take it
        elif node.get("subtask_type") not in CONTAINERS:
            options["root_id"] = flow_id
            options["headers"] = {**(options.get("headers") or {}), HEADER: flow_id}


def _nodes(canvas: Mapping[str, Any], is_first: bool) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """Every signature of a canvas, those that hold others before those that they hold."""
    yield canvas, is_first
    inner = canvas["kwargs"]
    match canvas.get("subtask_type"):
        case "chain":
            for number, member in enumerate(inner["tasks"]):
                yield from _nodes(member, is_first and number == 0)
        case "group":
            for member in inner["tasks"]:
                yield from _nodes(member, is_first)
        case "chord":
            header = inner["header"]
            members = header["kwargs"]["tasks"] if isinstance(header, Mapping) else header
            for member in members:
                yield from _nodes(member, is_first)
            if inner.get("body") is not None:
                yield from _nodes(inner["body"], is_first and not members)


def planned_by_message(embedded: Mapping[str, Any]) -> Iterator[Planned]:
    """The tasks that will follow the one of this message: the rest of its chain, its chord's body."""
    for signature in reversed(embedded.get("chain") or ()):
        yield from planned(signature)
    if (body := embedded.get("chord")) is not None:
        yield from planned(body)
