"""What happens in a simulated world besides workers and sweeps: who starts, cancels, emits and meddles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from celery_flows import FlowError, FlowHandle
from tests.simulation import flows as defined
from tests.simulation.flows import flows
from tests.simulation.world import World


@dataclass
class Scenario:
    """One kind of run. ``begin`` starts flows and adds actors; ``settle`` gives what is still waited for at the end."""

    name: str
    begin: Callable[[World], list[FlowHandle[Any]]]
    settle: Callable[[World, list[FlowHandle[Any]]], None] = lambda world, handles: None
    ends: tuple[str, ...] = ("finished",)
    check: Callable[[World, list[FlowHandle[Any]]], None] = lambda world, handles: None
    may_lose: bool = field(default=False)  # enough crashes in a row give the work up


def _starts(*definitions: Any) -> Callable[[World], list[FlowHandle[Any]]]:
    return lambda world: [definition.start() for definition in definitions]


def _quietly(action: Callable[[], object]) -> Callable[[], None]:
    """An API caller: what it is refused is its own affair."""

    def act() -> None:
        try:
            action()
        except FlowError:
            World.current.say("the caller was refused")

    return act


def _pause_a_while(handle: FlowHandle[Any]) -> None:
    flows.manager.pause(handle.id)
    flows.manager.unpause(handle.id)


ACTIONS: dict[str, Callable[[FlowHandle[Any]], object]] = {
    "cancel": lambda handle: handle.cancel(),
    "fail": lambda handle: flows.manager.fail(handle.id, "by hand"),
    "hard cancel": lambda handle: flows.manager.cancel(handle.id),
    "update": lambda handle: flows.manager.update_state(handle.id, {"seen": True}),
    "resume": lambda handle: handle.resume(),
    "pause": _pause_a_while,
}


def _with(action: str, *definitions: Any) -> Callable[[World], list[FlowHandle[Any]]]:
    """Starts flows, and has somebody do something to each of them at some time."""

    def begin(world: World) -> list[FlowHandle[Any]]:
        handles = [definition.start() for definition in definitions]
        for handle in handles:
            world.spawn(action, _quietly(partial(ACTIONS[action], handle)), killable=action == "cancel")
        return handles

    return begin


def _emits(count: int, *definitions: Any) -> Callable[[World], list[FlowHandle[Any]]]:
    def begin(world: World) -> list[FlowHandle[Any]]:
        handles = [definition.start() for definition in definitions]
        for number in range(count):
            world.spawn(f"emitter-{number}", _quietly(partial(flows.emit, "topic", "key", number)))
        return handles

    return begin


def _emit_missing(world: World, handles: list[FlowHandle[Any]]) -> None:
    """An emitter that died before its commit emitted nothing: somebody does it now."""
    if any(handle.get().wait_json for handle in handles):
        flows.emit("topic", "key", "late")


def _each_event_once(world: World, handles: list[FlowHandle[Any]]) -> None:
    taken = [handle.result(0) for handle in handles if handle.status() == "finished"]
    payloads = [payload for payload in taken if payload not in ("timed out", "late")]
    assert len(payloads) == len(set(payloads)), f"an event resumed two flows: {taken}"


ANY_END = ("finished", "failed", "cancelled")

SCENARIOS = [
    Scenario("inline", _starts(defined.inline, defined.inline), may_lose=True),
    Scenario("gather", _starts(defined.gather), may_lose=True),
    Scenario("gather fails", _starts(defined.gather_fails), may_lose=True),
    Scenario("gather fails for good", _starts(defined.gather_fails_for_good), ends=("failed",)),
    Scenario("retry", _starts(defined.retry), may_lose=True),
    Scenario("sleep", _starts(defined.sleep), may_lose=True),
    Scenario("cancel inline", _with("cancel", defined.inline), ends=ANY_END),
    Scenario("cancel gather", _with("cancel", defined.gather), ends=ANY_END),
    Scenario("cancel cleanup", _with("cancel", defined.cleanup), ends=ANY_END),
    Scenario("cancel sleep", _with("cancel", defined.sleep), ends=ANY_END),
    Scenario("cancel failing gather", _with("cancel", defined.gather_fails), ends=ANY_END),
    Scenario("cancel event", _with("cancel", defined.event), _emit_missing, ends=ANY_END),
    Scenario("fail by hand", _with("fail", defined.gather), ends=ANY_END),
    Scenario("cancel by hand", _with("hard cancel", defined.gather), ends=ANY_END),
    Scenario("update by hand", _with("update", defined.gather), may_lose=True),
    Scenario("resume by hand", _with("resume", defined.sleep), may_lose=True),
    Scenario("pause", _with("pause", defined.gather), may_lose=True),
    Scenario("one event", _emits(1, defined.event), _emit_missing, may_lose=True, check=_each_event_once),
    Scenario("two events", _emits(2, defined.event), _emit_missing, may_lose=True, check=_each_event_once),
    Scenario(
        "two waiters",
        _emits(2, defined.event, defined.event), _emit_missing, may_lose=True, check=_each_event_once,
    ),
    Scenario("event or timeout", _emits(1, defined.event_timeout), may_lose=True, check=_each_event_once),
    Scenario(
        "two waiters, one may time out",
        _emits(2, defined.event, defined.event_timeout), _emit_missing, may_lose=True, check=_each_event_once,
    ),
]  # fmt: skip
