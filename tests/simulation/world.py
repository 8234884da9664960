"""The simulated world: one database, one clock, a broker that is a list, and actors that a scheduler moves."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from greenlet import getcurrent, greenlet
from sqlalchemy.pool import StaticPool

from celery_flows import SqlFlowStore
from celery_flows.store.dispatch import Hint
from celery_flows.store.script import Call, Pause
from celery_flows.store.tables import metadata

START = datetime(2030, 1, 1, tzinfo=UTC)


class Violation(BaseException):
    """The simulation has found a state that must not be. No Exception, so that no step's failure hides it."""


class Crash(BaseException):
    """The actor's process dies at this very point."""


@dataclass
class Actor:
    """Something that runs: a worker with a message, a sweep, an emitter, a caller of the API."""

    name: str
    body: Callable[[], object]
    world: World
    killable: bool = True
    dead: bool = False
    frozen: bool = False  # stopped, as by SIGSTOP: time passes, it does not notice
    token: str = ""
    claims: dict[str, int] = field(default_factory=dict)  # run id → fence, as this actor claimed it
    at: str = "begin"

    def __post_init__(self) -> None:
        self._greenlet = greenlet(self._run)

    def _run(self) -> None:
        try:
            self.body()
        except Crash:
            self.dead = True

    @property
    def done(self) -> bool:
        return self.dead or bool(self._greenlet.dead)

    def go_on(self) -> None:
        """Runs the actor up to its next stop."""
        self._greenlet.switch()

    def crash(self) -> None:
        """Kills the actor where it stands. What it does on its way down no longer reaches the world."""
        self.dead = True
        if self._greenlet:
            self._greenlet.throw(Crash)


class World:
    """One run of the simulation."""

    current: World

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.clock = START
        self.actors: list[Actor] = []
        self.messages: list[Hint] = []
        self.log: list[str] = []
        self.effects: list[tuple[str, str]] = []  # run id or name, what
        self.lost: dict[str, set[int]] = {}  # run id → fences whose holder died, or whose lease ended
        self.not_before: dict[str, datetime] = {}  # run id → when its next attempt may begin
        World.current = self

    # ---- actors ----

    def spawn(self, name: str, body: Callable[[], object], *, killable: bool = True, token: str = "") -> Actor:
        """Adds an actor; it begins when the scheduler says so."""
        actor = Actor(name, body, self, killable, token=token)
        self.actors.append(actor)
        return actor

    def me(self) -> Actor | None:
        """The actor that is running."""
        running = getcurrent()
        return next((actor for actor in self.actors if actor._greenlet is running), None)

    def stop_here(self, where: str) -> None:
        """A point at which the scheduler may choose somebody else, or end this actor."""
        actor = self.me()
        if actor is None:
            return
        if actor.dead:
            raise Crash
        actor.at = where
        assert actor._greenlet.parent is not None
        actor._greenlet.parent.switch()
        if actor.dead:
            raise Crash

    def boottime(self) -> float:
        """Every process's own clock; time that passes while an actor is stopped passes for it too."""
        return (self.clock - START).total_seconds()

    def say(self, line: str) -> None:
        self.log.append(f"{self.boottime():7.1f} {line}")


class SimulatedPublisher:
    """The broker: a list from which the scheduler delivers in any order, twice, or never."""

    def publish(self, *hints: Hint) -> int:
        world = World.current
        world.stop_here("publish")
        world.messages += hints
        for hint in hints:
            world.say(f"publish {hint.kind} {hint.task}")
        return len(hints)


class SimulatedStore(SqlFlowStore):
    """The real store over SQLite in memory, whose every transaction is a stop of the scheduler's."""

    observer: Any = None  # told before and after each transaction; see invariants.py

    def _perform(self, step: Call | Pause) -> Any:
        world = World.current
        if isinstance(step, Pause):
            return None
        name = step.operation.__name__
        world.stop_here(f"before {name}")
        actor = world.me()
        before = self.observer.before(actor, step)
        try:
            answer = super()._perform(step)
        except Exception as error:
            world.say(f"{actor.name if actor else 'setup'}: {name} raised {type(error).__name__}")
            self.observer.after(actor, step, before, None, failed=True)
            world.stop_here(f"after {name}")
            raise
        world.say(f"{actor.name if actor else 'setup'}: {name}")
        self.observer.after(actor, step, before, answer, failed=False)
        world.stop_here(f"after {name}")
        return answer


def make_store() -> SimulatedStore:
    """A store over one connection in memory, whose SQL clock is the world's."""
    engine = sa.create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})

    @sa.event.listens_for(engine, "connect")
    def _connect(connection: Any, _: Any) -> None:
        connection.create_function("strftime", -1, _strftime)

    store = SimulatedStore(engine, check=False)
    metadata.create_all(engine)
    return store


def _strftime(form: str, base: str, *_: Any) -> str:
    assert base == "now"
    return World.current.clock.strftime("%Y-%m-%d %H:%M:%S.%f")


@contextmanager
def clean(store: SimulatedStore) -> Iterator[None]:
    """Empties all tables."""
    with store.engine.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(sa.delete(table))
    yield


def later(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)


def short(flow_id: UUID | str | None) -> str:
    """The end of an id: what of version 7 is random."""
    return str(flow_id)[-4:]
