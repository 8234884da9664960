"""What happens in a simulated world besides workers and sweeps: who starts, cancels, emits and meddles."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import UUID

from celery_flows import FlowError, FlowHandle, FlowStepStatus
from celery_flows.store import dispatch
from celery_flows.tasks.drive import drive
from celery_flows.tasks.replay import run_id_of
from celery_flows.tasks.steps import Delivery, run_step
from celery_flows.worker.stops import settle_ended
from tests.simulation import flows as defined
from tests.simulation.flows import flows, member
from tests.simulation.world import Actor, World


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


def _quietly(action: Callable[[], object], patience: tuple[int, ...] = (0, 8, 30, 90)) -> Callable[[], None]:
    """An API caller, who comes sooner or later: what it is refused is its own affair."""

    def act() -> None:
        for _ in range(World.current.rng.choice(patience)):
            World.current.stop_here("not there yet")
        try:
            action()
        except FlowError:
            World.current.say("the caller was refused")

    return act


def _update_often(handle: FlowHandle[Any]) -> None:
    for number in range(3):
        flows.manager.update_state(handle.id, {"seen": number})


def _pause_a_while(handle: FlowHandle[Any]) -> None:
    flows.manager.pause(handle.id)
    flows.manager.unpause(handle.id)


def _pause_and_cancel(handle: FlowHandle[Any]) -> None:
    """Nobody lets it go on."""
    flows.manager.pause(handle.id)
    handle.cancel()


ACTIONS: dict[str, Callable[[FlowHandle[Any]], object]] = {
    "cancel": lambda handle: handle.cancel(),
    "fail": lambda handle: flows.manager.fail(handle.id, "by hand"),
    "hard cancel": lambda handle: flows.manager.cancel(handle.id),
    "update": _update_often,
    "resume": lambda handle: handle.resume(),
    "pause": _pause_a_while,
    "pause and cancel": _pause_and_cancel,
}


def _with(action: str, *definitions: Any) -> Callable[[World], list[FlowHandle[Any]]]:
    """Starts flows, and has somebody do something to each of them at some time."""

    def begin(world: World) -> list[FlowHandle[Any]]:
        handles = [definition.start() for definition in definitions]
        for handle in handles:
            world.spawn(action, _quietly(partial(ACTIONS[action], handle)), killable=action == "cancel")
        return handles

    return begin


def _cancels_beside_a_member(definition: Any) -> Callable[[World], list[FlowHandle[Any]]]:
    """Cancels when one member is at work and another is not; who is at work when it drains takes his time."""

    def begin(world: World) -> list[FlowHandle[Any]]:
        handle = definition.start()

        def hold_members_up() -> None:
            for actor in world.actors:
                actor.frozen = actor.frozen or actor.at.startswith("in member")

        def cancel() -> None:
            for _ in range(200):
                members = [row for row in defined.observer.dispatch().values() if row["kind"] == "step"]
                if len({row["worker"] is None for row in members}) == 2:
                    break
                World.current.stop_here("watching the members")
            handle.cancel()

        world.at_stop["after drain"] = hold_members_up
        world.spawn("cancel", _quietly(cancel, patience=(0,)), killable=False)
        return [handle]

    return begin


def _interrupts(definition: Any) -> Callable[[World], list[FlowHandle[Any]]]:
    """Somebody cancels while a step runs, and a worker's parent looks again and again for what runs of flows that are
    to end: it interrupts that, or ends its process."""

    def begin(world: World) -> list[FlowHandle[Any]]:
        world.stops_in_a_body = 6
        handle = definition.start()

        def cancel() -> None:
            for _ in range(world.rng.choice((1, 1, 5, 10))):
                _until_in_a_body(world)
            handle.cancel()

        def keep() -> None:
            for _ in range(60):
                if not _until_in_a_body(world):
                    return
                bodies = _in_a_body(world)
                for held in flows.runtime.store.run(dispatch.list_to_stop, list(bodies)):
                    if bodies[held.worker].in_body == held.worker:
                        _stop(world, bodies[held.worker], held)

        world.spawn("cancel", _quietly(cancel, patience=(0,)), killable=False)
        world.spawn("keeper", keep)
        return [handle]

    return begin


def _interrupts_by_mistake(definition: Any) -> Callable[[World], list[FlowHandle[Any]]]:
    """What was meant for the body before strikes another, whose flow is not to end."""

    def begin(world: World) -> list[FlowHandle[Any]]:
        world.stops_in_a_body = 3

        def strike() -> None:
            for _ in range(3):
                if _until_in_a_body(world):
                    actor = world.rng.choice(list(_in_a_body(world).values()))
                    world.say(f"{actor.name} is interrupted by mistake")
                    actor.interrupted = True

        world.spawn("struck", strike)
        return [definition.start()]

    return begin


def _in_a_body(world: World) -> dict[str, Actor]:
    return {actor.in_body: actor for actor in world.actors if actor.in_body is not None and not actor.done}


def _until_in_a_body(world: World) -> bool:
    """Waits until somebody is in the midst of a step; not for ever."""
    for _ in range(100):
        world.stop_here("watching the steps")
        if _in_a_body(world):
            return True
    return False


def _stop(world: World, actor: Actor, held: dispatch.Held) -> None:
    if world.rng.random() < 0.6:
        world.say(f"{actor.name} is interrupted {actor.at}")
        actor.interrupted = True
    else:
        world.lose(defined.leases_of(actor.token))
        world.say(f"{actor.name} is ended {actor.at}")
        actor.crash()
        settle_ended(flows.runtime, held)


def _with_a_late_message(definition: Any) -> Callable[[World], list[FlowHandle[Any]]]:
    """A message that was long about comes when a sweep is just giving its work up."""

    def begin(world: World) -> list[FlowHandle[Any]]:
        handle = definition.start()
        run_id, delivery = run_id_of(handle.id, "simulation.poison", 1), Delivery("late", "simulation", False)
        world.at_stop["before fail_lost"] = lambda: world.spawn(
            "late", lambda: drive(flows.runtime, handle.id, "late"), token="late"
        )
        world.at_stop["before complete_step"] = lambda: world.spawn(
            "late", lambda: run_step(flows.runtime, run_id, delivery), token="late"
        )
        return [handle]

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


def _emits_at_the_last_moment(world: World) -> list[FlowHandle[Any]]:
    """The event comes when the waiter has looked for it and is about to park."""
    emit = _quietly(partial(flows.emit, "topic", "key", 0), patience=(0,))
    world.at_stop["before park"] = lambda: world.spawn("emitter", emit)
    return [defined.event.start()]


def _ends_the_holder(world: World) -> list[FlowHandle[Any]]:
    """Somebody ends the flow that has the only slot while another queues for it."""
    handles = [defined.limited_tree.start(0) for _ in range(2)]

    def end() -> None:
        for _ in range(200):
            rows = defined.observer.dispatch().values()
            holder = next((row for row in rows if row["has_slot"]), None)
            if holder is not None and any(row["queued_at"] for row in rows):
                flows.manager.cancel(UUID(holder["flow_id"]))
                return
            World.current.stop_here("watching the queue")

    world.spawn("hard cancel", _quietly(end, patience=(0,)), killable=False)
    return handles


def _starts_twice(world: World) -> list[FlowHandle[Any]]:
    """Two callers start the same piece of work."""
    handles: list[FlowHandle[Any]] = []

    def start() -> None:
        handles.append(defined.inline.start(key="order 7"))

    for number in range(2):
        world.spawn(f"starter-{number}", _quietly(start), killable=False)
    return handles


def _started_once(world: World, handles: list[FlowHandle[Any]]) -> None:
    assert len({handle.id for handle in handles}) == 1, f"one key, two flows: {handles}"


def _goes_back(world: World) -> list[FlowHandle[Any]]:
    """Somebody retries a flow as soon as it has failed, perhaps twice, and perhaps dies over it."""
    handle = defined.broken.start()

    def go_back() -> None:
        for _ in range(200):
            if handle.status().is_terminal:
                break
            World.current.stop_here("watching the flow")
        handle.retry()

    for number in range(2):
        world.spawn(f"mender-{number}", _quietly(go_back))
    return [handle]


def _nothing_twice(world: World, handles: list[FlowHandle[Any]]) -> None:
    """What went back has ended, and has done nothing that it took over."""
    (first,) = handles
    done = {step.run_id for step in flows.store.list_steps(first.id) if step.status is FlowStepStatus.SUCCEEDED}
    again = {"two"} | {f"member-{n - 1}" for n in (1, 2, 3) if run_id_of(first.id, member.name, n) not in done}
    if run_id_of(first.id, "one", 1) not in done:
        again.add("one")
    for (fork_id,) in defined.observer.rows("SELECT id FROM flows WHERE forked_from IS NOT NULL"):
        fork = flows.handle(UUID(fork_id))
        effects = {name for flow_id, name in world.effects if flow_id == str(fork.id)}
        assert effects <= again, f"done again: {effects - again}"
        lost = any(len(fences) >= defined.MAX_CRASHES for fences in world.lost.values())
        assert lost or (fork.status(), fork.state()) == ("finished", {"told": True}), f"it is {fork.status()}"


def _two_waiters_and_a_cancel(world: World) -> list[FlowHandle[Any]]:
    handles = _emits(1, defined.event, defined.event)(world)
    world.spawn("cancel", _quietly(handles[0].cancel))
    return handles


def _observed(world: World) -> list[FlowHandle[Any]]:
    """Somebody records by hand what he thinks came of steps that workers run."""
    handles = [defined.gather.start()]
    flow_id = handles[0].id

    def observe(number: int) -> None:
        seen: dict[str, Any] = {"flow_id": flow_id, "run_id": run_id_of(flow_id, "simulation.member", number)}
        flows.manager.record_step_observation(**seen, task="simulation.member", status=FlowStepStatus.SUCCEEDED)

    def wait_and_observe() -> None:
        for number in (1, 2):
            for _ in range(40):  # then he has lost his patience
                if flows.runtime.store.find_step_by_run_id(flow_id, run_id_of(flow_id, "simulation.member", number)):
                    observe(number)
                    break

    world.spawn("observer", _quietly(wait_and_observe), killable=False)
    return handles


def _deaths_are_few(world: World, handles: list[FlowHandle[Any]]) -> None:
    # A message that is still about may come between the last death and the sweep that gives up.
    most = max(world.deaths.values(), default=0)
    assert most <= 2 * defined.MAX_CRASHES, f"one step killed {most} workers"


def _cleaned_up(world: World, handles: list[FlowHandle[Any]]) -> None:
    """Who was cancelled has cleaned up, unless that was given up after too many crashes."""
    for handle in handles:
        often = any(len(fences) >= defined.MAX_CRASHES for fences in world.lost.values())
        if handle.status() == "cancelled" and not often:
            effects = {name for flow_id, name in world.effects if flow_id == str(handle.id)}
            assert {"undo", "member-9"} <= effects, f"cancelled and not cleaned up: {effects}"


def _undone(world: World, handles: list[FlowHandle[Any]]) -> None:
    """All was undone, unless that was given up after too many crashes."""
    often = any(len(fences) >= defined.MAX_CRASHES for fences in world.lost.values())
    for handle in handles:
        effects = {name for flow_id, name in world.effects if flow_id == str(handle.id)}
        began = any(name.startswith("member-") and name != "member-9" for name in effects)
        assert often or not began or {"undo", "member-9"} <= effects, f"ended and not undone: {effects}"


def _emits_both(world: World) -> list[FlowHandle[Any]]:
    handles = [defined.choice.start()]
    for correlation_id in ("key", "other"):
        emit = partial(flows.emit, "topic", correlation_id, correlation_id)
        world.spawn(f"emitter-{correlation_id}", _quietly(emit))
    return handles


def _emit_one(world: World, handles: list[FlowHandle[Any]]) -> None:
    if not all(handle.status().is_terminal for handle in handles):
        flows.emit("topic", "key", "late")


def _given_back(world: World, handles: list[FlowHandle[Any]]) -> None:
    """The event that was not taken is there for somebody else, once."""
    kept = [json.loads(text) for (text,) in defined.observer.rows(
        "SELECT payload_json FROM flow_inbox WHERE consumed_by IS NULL"
    )]  # fmt: skip
    taken = [handle.result(0) for handle in handles if handle.status() == "finished"]
    assert len({*taken, *kept}) == len([*taken, *kept]), f"an event is given back and taken: {taken}, {kept}"


def _each_event_once(world: World, handles: list[FlowHandle[Any]]) -> None:
    taken = [handle.result(0) for handle in handles if handle.status() == "finished"]
    payloads = [payload for payload in taken if payload not in ("timed out", "late")]
    assert len(payloads) == len(set(payloads)), f"an event resumed two flows: {taken}"


ANY_END = ("finished", "failed", "cancelled")
LIMITED = (defined.limited,) * 4

SCENARIOS = [
    Scenario("inline", _starts(defined.inline, defined.inline), may_lose=True),
    Scenario("gather", _starts(defined.gather), may_lose=True),
    Scenario("gather fails", _starts(defined.gather_fails), may_lose=True),
    Scenario("gather fails for good", _starts(defined.gather_fails_for_good), ends=("failed",)),
    Scenario("retry", _starts(defined.retry), may_lose=True),
    Scenario("retry fails", _starts(defined.retry_fails), may_lose=True),
    Scenario("inline retry", _starts(defined.inline_retry), may_lose=True),
    Scenario("cancel inline retry", _with("cancel", defined.inline_retry), ends=ANY_END),
    Scenario("pause inline retry", _with("pause", defined.inline_retry), may_lose=True),
    Scenario("async", _starts(defined.side_by_side), may_lose=True),
    Scenario("async fails", _starts(defined.side_by_side_fails), may_lose=True),
    Scenario("async retry", _starts(defined.side_by_side_retried), may_lose=True),
    Scenario("async in a plain flow", _starts(defined.beside_in_a_plain_flow), may_lose=True),
    Scenario("cancel async", _with("cancel", defined.side_by_side), ends=ANY_END),
    Scenario("cancel async retry", _with("cancel", defined.side_by_side_retried), ends=ANY_END),
    Scenario("pause async retry", _with("pause", defined.side_by_side_retried), may_lose=True),
    Scenario("update async", _with("update", defined.side_by_side_fails), may_lose=True),
    Scenario("window", _starts(defined.window), may_lose=True),
    Scenario("window fails", _starts(defined.window_fails), may_lose=True),
    Scenario("cancel window", _with("cancel", defined.window), ends=ANY_END),
    Scenario("pause window", _with("pause", defined.window), may_lose=True),
    Scenario("race", _starts(defined.race), may_lose=True),
    Scenario("cancel race", _with("cancel", defined.race), ends=ANY_END),
    Scenario("deadline", _starts(defined.deadline), ends=("failed",)),
    Scenario("cancel before the deadline", _with("cancel", defined.deadline), ends=ANY_END),
    Scenario("saga", _starts(defined.saga), ends=("failed",), check=_undone),
    Scenario("cancel saga", _with("cancel", defined.saga), ends=ANY_END, check=_undone),
    Scenario("poisoned step", _with_a_late_message(defined.poisoned_step), may_lose=True, check=_deaths_are_few),
    Scenario("poisoned driver", _with_a_late_message(defined.poisoned_driver), ends=("failed",), check=_deaths_are_few),
    Scenario("two starts", _starts_twice, may_lose=True, check=_started_once),
    Scenario("observed by hand", _observed, may_lose=True),
    Scenario("goes back", _goes_back, ends=("failed",), check=_nothing_twice),
    Scenario("sleep", _starts(defined.sleep), may_lose=True),
    Scenario("cancel inline", _with("cancel", defined.inline), ends=ANY_END),
    Scenario("cancel gather", _with("cancel", defined.gather), ends=ANY_END),
    Scenario("cancel cleanup", _with("cancel", defined.cleanup), ends=ANY_END, check=_cleaned_up),
    Scenario("children", _starts(defined.parent), may_lose=True),
    Scenario("cancel parent", _with("cancel", defined.parent), ends=ANY_END),
    Scenario("fail parent by hand", _with("fail", defined.parent), ends=ANY_END),
    Scenario("two joins", _starts(defined.two_joins), may_lose=True),
    Scenario("cancel two joins", _with("cancel", defined.two_joins), ends=ANY_END),
    Scenario("cancel beside a member", _cancels_beside_a_member(defined.cleanup), ends=ANY_END, check=_cleaned_up),
    Scenario("cancel beside a straggler", _cancels_beside_a_member(defined.two_joins), ends=ANY_END),
    Scenario("cancel sleep", _with("cancel", defined.sleep), ends=ANY_END),
    Scenario("cancel failing gather", _with("cancel", defined.gather_fails), ends=ANY_END),
    Scenario("cancel event", _with("cancel", defined.event), _emit_missing, ends=ANY_END),
    Scenario("fail by hand", _with("fail", defined.gather), ends=ANY_END),
    Scenario("cancel by hand", _with("hard cancel", defined.gather), ends=ANY_END),
    Scenario("update by hand", _with("update", defined.gather), may_lose=True),
    Scenario("resume by hand", _with("resume", defined.sleep), may_lose=True),
    Scenario("pause", _with("pause", defined.gather), may_lose=True),
    Scenario("cancel paused cleanup", _with("pause and cancel", defined.cleanup), ends=ANY_END, check=_cleaned_up),
    Scenario("cancel paused parent", _with("pause and cancel", defined.parent), ends=ANY_END),
    Scenario("cancel paused event", _with("pause and cancel", defined.event), _emit_missing, ends=ANY_END),
    Scenario("cancel paused limited", _with("pause and cancel", *LIMITED), ends=ANY_END),
    Scenario("one of two events", _emits_both, _emit_one, may_lose=True, check=_given_back),
    Scenario("one event", _emits(1, defined.event), _emit_missing, may_lose=True, check=_each_event_once),
    Scenario("event before the park", _emits_at_the_last_moment, _emit_missing, may_lose=True, check=_each_event_once),
    Scenario("two events", _emits(2, defined.event), _emit_missing, may_lose=True, check=_each_event_once),
    Scenario(
        "two waiters",
        _emits(2, defined.event, defined.event), _emit_missing, may_lose=True, check=_each_event_once,
    ),
    Scenario("two waiters, one cancelled", _two_waiters_and_a_cancel, _emit_missing, ends=ANY_END,
             check=_each_event_once),
    Scenario("event or timeout", _emits(1, defined.event_timeout), may_lose=True, check=_each_event_once),
    Scenario("interrupt inline", _interrupts(defined.inline), ends=ANY_END),
    Scenario("interrupt cleanup", _interrupts(defined.cleanup), ends=ANY_END, check=_cleaned_up),
    Scenario("interrupt two joins", _interrupts(defined.two_joins), ends=ANY_END),
    Scenario("interrupt race", _interrupts(defined.race), ends=ANY_END),
    Scenario("interrupt saga", _interrupts(defined.saga), ends=ANY_END, check=_undone),
    Scenario("interrupt inline retry", _interrupts(defined.inline_retry), ends=ANY_END),
    Scenario("interrupt retry", _interrupts(defined.retry), ends=ANY_END),
    Scenario("interrupt inline by mistake", _interrupts_by_mistake(defined.inline), may_lose=True),
    Scenario("interrupt gather by mistake", _interrupts_by_mistake(defined.gather), may_lose=True),
    Scenario(
        "two waiters, one may time out",
        _emits(2, defined.event, defined.event_timeout), _emit_missing, may_lose=True, check=_each_event_once,
    ),
    Scenario("limited", _starts(*LIMITED), may_lose=True),
    Scenario("limited tree", lambda world: [defined.limited_tree.start(1) for _ in range(2)], may_lose=True),
    Scenario("limited starts", _starts(*(defined.limited_starts,) * 4), may_lose=True),
    Scenario("cancel limited", _with("cancel", *LIMITED), ends=ANY_END),
    Scenario("cancel limited by hand", _with("hard cancel", *LIMITED), ends=ANY_END),
    Scenario("end the holder by hand", _ends_the_holder, ends=ANY_END),
    Scenario("pause limited", _with("pause", *LIMITED), may_lose=True),
    Scenario("update limited", _with("update", *LIMITED), may_lose=True),
    Scenario("deadline of limited", _starts(*(defined.limited_deadline,) * 4), ends=("finished", "failed")),
]  # fmt: skip
