"""One seed: chaos for a while, then quiet, then everything must have come to rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from uuid import UUID

import sqlalchemy as sa
import uuid_utils.compat

from celery_flows import FlowHandle
from celery_flows.store import audit, dispatch
from celery_flows.store.dispatch import Hint
from celery_flows.store.tables import flow_dispatch, flow_limits
from celery_flows.tasks import claimed, lease, maintenance
from celery_flows.tasks import drive as drive_module
from celery_flows.tasks import runtime as runtime_module
from celery_flows.tasks import steps as steps_module
from celery_flows.tasks.ahead import Ahead
from celery_flows.tasks.drive import drive
from celery_flows.tasks.steps import Delivery, run_step
from tests.simulation.flows import MAX_CRASHES, flows, leases_of, observer, store
from tests.simulation.scenarios import SCENARIOS, Scenario
from tests.simulation.world import Actor, Violation, World, as_text, clean, later

MAX_MOVES, MAX_ROUNDS = 600, 80
CRASHES, DROPS, DOUBLES, JUMPS, STOPS, TROUBLES = 2, 2, 2, 2, 2, 2


class Run:
    """One world under one scenario, by one seed."""

    def __init__(self, seed: int, scenario: Scenario | None = None) -> None:
        self.world = World(seed)
        self.rng = self.world.rng
        self.scenario = scenario or self.rng.choice(SCENARIOS)
        some = self.rng.randrange
        self._fault_rate = self.rng.choice((0.04, 0.12, 0.25))
        self.left = {
            "crash": some(CRASHES + 1),
            "drop": DROPS,
            "double": DOUBLES,
            "jump": some(JUMPS + 1),
            "stop": some(STOPS + 1),
        }
        self.world.troubles = {"busy": some(TROUBLES + 1), "lost reply": some(TROUBLES + 1)}
        self._workers = 0

    def play(self) -> None:
        """Plays the run.

        Raises:
            Violation: with the log of the run.
        """
        World.current = self.world
        try:
            with clean(store), own_machine():
                observer.reset()
                self.handles = self.scenario.begin(self.world)
                self._chaos()
                self._quiet()
                self._check_end()
        except (AssertionError, Violation) as error:
            log = "\n".join(self.world.log)
            raise Violation(f"{self.scenario.name}: {error}\n{log}") from error
        finally:
            for actor in self.world.actors:
                if not actor.done:
                    actor.crash()

    # ---- the scheduler ----

    def _chaos(self) -> None:
        for _ in range(self.rng.randrange(20, MAX_MOVES)):
            live = self._live()
            if not live and not self.world.messages and self.rng.random() < 0.3:
                return
            self._move(live)

    def _live(self) -> list[Actor]:
        return [actor for actor in self.world.actors if not actor.done and not actor.frozen]

    def _move(self, live: list[Actor]) -> None:
        dice = self.rng.random()
        if dice < self._fault_rate:
            faults = (self._freeze, self._freeze, self._crash, self._crash, self._stop, self._renew, self._hold_up)
            self.rng.choice(faults)(live)
        elif live and dice < 0.78:
            self.rng.choice(live).go_on()
        elif dice < 0.9:
            self._deliver()
        elif dice < 0.94:
            self._spawn_sweep(live)
        elif dice < 0.97:
            pass_time(self.rng.choice((0.5, 2, 6)))
        else:
            self._thaw()

    def _deliver(self) -> None:
        if not self.world.messages:
            return
        hint = self.rng.choice(self.world.messages)
        if self.left["drop"] and self.rng.random() < 0.1:
            self.left["drop"] -= 1
            self.world.messages.remove(hint)
            self.world.say(f"the broker loses {hint.kind}")
            return
        if self.left["double"] and self.rng.random() < 0.1:
            self.left["double"] -= 1
        else:
            self.world.messages.remove(hint)
        self._work(hint)

    def _work(self, hint: Hint) -> None:
        self._workers += 1
        token = f"worker-{self._workers}"
        if hint.kind == "drive":
            self.world.spawn(token, lambda: drive(flows.runtime, UUID(hint.run_id), token), token=token)
        else:
            delivery = Delivery(token, "simulation", False)
            self.world.spawn(token, lambda: run_step(flows.runtime, hint.run_id, delivery), token=token)

    def _spawn_sweep(self, live: list[Actor]) -> None:
        if sum(actor.name == "sweep" for actor in live) < 2:
            self.world.spawn("sweep", lambda: maintenance.sweep(flows.runtime))

    def _crash(self, live: list[Actor]) -> None:
        victims = [actor for actor in live if actor.killable]
        if not victims or not self.left["crash"]:
            return
        self.left["crash"] -= 1
        victim = self.rng.choice(victims)
        self.world.lose(leases_of(victim.token))
        self.world.say(f"{victim.name} dies {victim.at}")
        victim.crash()
        if victim.token and self.rng.random() < 0.5:  # its parent notices, sooner or later
            token = victim.token
            self.world.spawn("parent", lambda: store.run(dispatch.release, [token]))

    def _stop(self, live: list[Actor]) -> None:
        """Tells a worker to stop: to begin nothing new, or to end at once. Then its parent hands back what it held."""
        workers = [actor for actor in live if actor.token and not actor.stopping]
        if not workers or not self.left["stop"]:
            return
        self.left["stop"] -= 1
        worker = self.rng.choice(workers)
        worker.stopping = True
        self.world.say(f"{worker.name} is told to stop {worker.at}")
        if self.rng.random() < 0.5:
            self.world.say(f"{worker.name} is ended {worker.at}")
            worker.crash()
            self.world.spawn("stopping parent", lambda: self._hand_back(worker.token), killable=False)

    def _hand_back(self, token: str) -> None:
        store.run(dispatch.hand_back_all, store.run(dispatch.list_holders, f"{token}/"))

    def _renew(self, live: list[Actor]) -> None:
        """A parent renews what a process of its tree holds, which may have been overtaken long ago."""
        tokens = [actor.token for actor in live if actor.token]
        if tokens:
            token = self.rng.choice(tokens)
            lease = flows.runtime.settings.lease_seconds
            self.world.spawn("renewing parent", lambda: store.run(dispatch.renew, [token], lease))

    def _freeze(self, live: list[Actor]) -> None:
        """Stops a worker in its tracks, so that its lease ends and another takes over before it goes on."""
        workers = [actor for actor in live if actor.token]
        if not workers or not self.left["jump"]:
            return
        self.left["jump"] -= 1
        victim = self.rng.choice(workers)
        victim.frozen = True
        self.world.say(f"{victim.name} freezes {victim.at}")
        pass_time(31)

    def _hold_up(self, live: list[Actor]) -> None:
        """Somebody is slow, but lives within his lease; the others go on."""
        if len(live) > 1:
            self.rng.choice(live).frozen = True

    def _thaw(self) -> None:
        for actor in self.world.actors:
            actor.frozen = False

    # ---- quiet ----

    def _quiet(self) -> None:
        """No more faults. Messages are delivered before time passes, or the worst flaws hide."""
        self.world.say("quiet")
        self.world.troubles.clear()
        for number in range(MAX_ROUNDS):
            self._run_all()
            self._thaw()
            if self._at_rest():
                return
            if number % 10 == 9:
                self.world.spawn("settle", lambda: self.scenario.settle(self.world, self.handles))
            self.world.spawn("sweep", lambda: maintenance.sweep(flows.runtime))
            self._run_all()
            if not self.world.messages:
                self._pass_to_next()
        raise Violation("it does not come to rest: " + ", ".join(f"{handle.get().status}" for handle in self.handles))

    def _run_all(self) -> None:
        for _ in range(10_000):
            live = self._live()
            if live:
                self.rng.choice(live).go_on()
            elif self.world.messages:
                self._work(self.world.messages.pop(self.rng.randrange(len(self.world.messages))))
            else:
                return
        raise Violation(
            "actors run for ever: " + ", ".join(f"{a.name} at {a.at}" for a in self.world.actors if not a.done)
        )

    def _at_rest(self) -> bool:
        if self._live():
            return False
        return all(handle.status().is_terminal for handle in self.handles) and not observer.dispatch()

    def _pass_to_next(self) -> None:
        with store.engine.connect() as connection:
            due = connection.scalar(sa.select(sa.func.min(flow_dispatch.c.due_at)))
            if due is None:  # or each round would be one of a limit's polls
                due = connection.scalar(sa.select(sa.func.min(flow_limits.c.due_at)))
        seconds = 1.0 if due is None else max(1.0, (due - self.world.clock).total_seconds())
        pass_time(seconds)

    # ---- the end ----

    def _check_end(self) -> None:
        torn = [str(finding) for finding in audit.verify(store)]
        if torn:
            raise Violation(f"(2) the events do not give the rows: {torn}")
        for handle in self.handles:
            self._check_handle(handle)
        self.scenario.check(self.world, self.handles)

    def _check_handle(self, handle: FlowHandle[Any]) -> None:
        flow = handle.get()
        if flow.status in self.scenario.ends:
            return
        reason = flow.state_json.get("failure", {}).get("reason")
        given_up = reason in ("lost", "StepLost") or "StepLost" in str(flow.error_json)
        often = any(len(fences) >= MAX_CRASHES for fences in self.world.lost.values())
        if not (self.scenario.may_lose and given_up and often):
            raise Violation(f"flow ended as {flow.status} ({reason}: {flow.error_json})")


def pass_time(seconds: float) -> None:
    """Time passes for everybody, and with it leases end."""
    world = World.current
    world.clock += later(seconds)
    ended = "SELECT run_id, fence FROM flow_dispatch WHERE worker IS NOT NULL AND due_at <= ?"
    world.lose([(run_id, fence) for run_id, fence in observer.rows(ended, as_text(world.clock))])
    world.say(f"{seconds} s pass")


@contextmanager
def own_machine() -> Iterator[None]:
    """Workers' own clocks are the world's, and what they draw at random is drawn from the seed."""

    def boottime() -> float:
        return World.current.boottime()

    with ExitStack() as patches:
        for module in (claimed, drive_module, lease, steps_module):
            patches.enter_context(patch.object(module, "boottime", boottime))
        tokens = SimpleNamespace(token_hex=lambda count: World.current.token_hex(count))
        patches.enter_context(patch.object(runtime_module, "secrets", tokens))
        patches.enter_context(patch.object(flows.runtime, "ahead", {"step": Ahead(), "flow": Ahead()}))
        patches.enter_context(patch.object(flows.runtime, "pause", pass_time))
        patches.enter_context(patch.object(uuid_utils.compat, "uuid7", lambda: World.current.new_id()))
        yield
