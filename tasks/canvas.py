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


def planned(canvas: Mapping[str, Any], is_first: bool = False) -> Iterator[Planned]:
    """The tasks of a frozen canvas, or of what a message carries of one. What has no id yet is left out: callbacks
    (``link``), which have theirs made when they are published."""
    for signature, first in _signatures(canvas, is_first):
        run_id = signature["options"].get("task_id")
        if run_id is not None:
            yield Planned(run_id, signature["task"], first)


def mark(canvas: Mapping[str, Any], flow_id: str) -> None:
    """Has the messages of a canvas say which mirrored flow they belong to; that is their root, too."""
    for signature, _ in _signatures(canvas, True):
        options = signature["options"]
        options["root_id"] = flow_id
        options["headers"] = {**(options.get("headers") or {}), HEADER: flow_id}


def _signatures(canvas: Mapping[str, Any], is_first: bool) -> Iterator[tuple[Mapping[str, Any], bool]]:
    inner = canvas["kwargs"]
    match canvas.get("subtask_type"):
        case "chain":
            for number, member in enumerate(inner["tasks"]):
                yield from _signatures(member, is_first and number == 0)
        case "group":
            for member in inner["tasks"]:
                yield from _signatures(member, is_first)
        case "chord":
            header = inner["header"]
            members = header["kwargs"]["tasks"] if isinstance(header, Mapping) else header
            for member in members:
                yield from _signatures(member, is_first)
            if inner.get("body") is not None:
                yield from _signatures(inner["body"], is_first and not members)
        case _:
            yield canvas, is_first


def planned_by_message(embedded: Mapping[str, Any]) -> Iterator[Planned]:
    """The tasks that will follow the one of this message: the rest of its chain, its chord's body."""
    for signature in reversed(embedded.get("chain") or ()):
        yield from planned(signature)
    if (body := embedded.get("chord")) is not None:
        yield from planned(body)
