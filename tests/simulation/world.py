"""The simulated world: one database, one clock, a broker that is a list, and actors that a scheduler moves."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

import sqlalchemy as sa
from greenlet import getcurrent, greenlet
from sqlalchemy.pool import StaticPool

from celery_flows import SqlFlowStore
from celery_flows.store.dispatch import Hint
from celery_flows.store.script import Call, Pause
from celery_flows.store.tables import metadata

START = datetime(2030, 1, 1, tzinfo=UTC)


T = TypeVar("T")


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
    stopping: bool = False  # told to stop, as by SIGTERM
    begun_stopping: int = 0  # steps it has begun since
    running_beside: int = 0  # members of a gather whose bodies are running in this actor's loop
    token: str = ""
    in_body: str | None = None  # the claim whose step's body it runs, if that can be interrupted
    interrupted: bool = False  # that body is to be left
    claims: dict[str, int] = field(default_factory=dict)  # run id → fence, as this actor claimed it
    looked: dict[str, int] = field(default_factory=dict)  # event key → the inbox's last position at its last look
    at: str = "begin"

    def __post_init__(self) -> None:
        scheduler = getcurrent()
        while scheduler.parent is not None:  # an actor may bring up another
            scheduler = scheduler.parent
        self._greenlet = greenlet(self._run, scheduler)
        self._stopped = self._greenlet  # where it goes on: itself, or a greenlet of a loop that it runs

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
        self._stopped.switch()

    def stop(self) -> None:
        """Lets the scheduler go on. A thread has one event loop that runs; here every actor has a thread to itself."""
        scheduler, loop = self._greenlet.parent, asyncio._get_running_loop()
        assert scheduler is not None
        self._stopped = getcurrent()
        asyncio._set_running_loop(None)
        try:
            scheduler.switch()
        finally:
            asyncio._set_running_loop(loop)

    def holds(self, worker: str | None) -> bool:
        """Whether a row with this worker is this actor's."""
        return bool(self.token) and worker is not None and worker.startswith(f"{self.token}/")

    def crash(self) -> None:
        """Kills the actor where it stands. What it does on its way down no longer reaches the world."""
        self.dead = True
        if self._greenlet:
            self._stopped.throw(Crash)


class World:
    """One run of the simulation."""

    current: World

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._ids = random.Random(f"ids of {seed}")
        self.clock = START
        self.actors: list[Actor] = []
        self.messages: list[Hint] = []
        self.log: list[str] = []
        self.effects: list[tuple[str, str]] = []  # run id or name, what
        self.lost: dict[str, set[int]] = {}  # run id → fences whose holder died, or whose lease ended
        self.uncounted: dict[str, set[int]] = {}  # the same, of those since the last record of the row's owner
        self.deaths: Counter[tuple[str, str]] = Counter()  # flow id and step's name → workers it has killed
        self.not_before: dict[str, datetime] = {}  # run id → when its next attempt may begin
        self.at_stop: dict[str, Callable[[], object]] = {}  # what comes up when an actor first stops there
        self.troubles: dict[str, int] = {}  # of the database: how many are left; none once it is quiet
        self.stops_in_a_body = 1
        World.current = self

    # ---- actors ----

    def spawn(self, name: str, body: Callable[[], object], *, killable: bool = True, token: str = "") -> Actor:
        """Adds an actor; it begins when the scheduler says so."""
        actor = Actor(name, body, self, killable, token=token)
        self.actors.append(actor)
        return actor

    def me(self) -> Actor | None:
        """The actor that is running."""
        running, actors = getcurrent(), {id(actor._greenlet): actor for actor in self.actors}
        while running is not None:
            if (actor := actors.get(id(running))) is not None:
                return actor
            running = running.parent
        return None

    def stop_here(self, where: str) -> None:
        """A point at which the scheduler may choose somebody else, or end this actor."""
        actor = self.me()
        if actor is None:
            return
        if actor.dead:
            raise Crash
        actor.at = where
        if (comes_up := self.at_stop.pop(where, None)) is not None:
            comes_up()
        actor.stop()
        if actor.dead:
            raise Crash

    def troubled_by(self, trouble: str) -> bool:
        """Whether the database is in this trouble just now, for an actor."""
        if not self.troubles.get(trouble) or self.me() is None or self.rng.random() > 0.04:
            return False
        self.troubles[trouble] -= 1
        return True

    def lose(self, leases: list[tuple[str, int]]) -> None:
        """These leases ended with their holder's life, or by time."""
        for run_id, fence in leases:
            self.lost.setdefault(run_id, set()).add(fence)
            self.uncounted.setdefault(run_id, set()).add(fence)

    # ---- what a process asks its machine ----

    def boottime(self) -> float:
        """Every process's own clock; time that passes while an actor is stopped passes for it too."""
        return (self.clock - START).total_seconds()

    def new_id(self) -> UUID:
        """A UUID of version 7, the same in every replay of the seed."""
        milliseconds = int(self.clock.timestamp() * 1000)
        return UUID(int=milliseconds << 80 | 7 << 76 | self._ids.getrandbits(12) << 64 | 2 << 62
                    | self._ids.getrandbits(62))  # fmt: skip

    def token_hex(self, count: int) -> str:
        return self._ids.randbytes(count).hex()

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


class SimulatedStopping:
    """Whether the worker that asks has been told to stop."""

    def is_set(self) -> bool:
        actor = World.current.me()
        return actor is not None and actor.stopping


class SimulatedInterrupts:
    """Which actors are in the midst of a body that can be interrupted."""

    @contextmanager
    def body(self, worker: str) -> Iterator[None]:
        actor = World.current.me()
        if actor is None:
            yield
            return
        actor.in_body, actor.interrupted = worker, False
        try:
            yield
        finally:
            actor.in_body = None

    async def coroutine(self, worker: str, body: Coroutine[Any, Any, T]) -> T:
        with self.body(worker):
            return await body


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
        who = actor.name if actor else "setup"
        if world.troubled_by("busy"):
            world.say(f"{who}: {name} finds the database locked")
            raise sa.exc.OperationalError(name, None, Exception("database is locked"))
        try:
            answer = super()._perform(step)
        except Exception as error:
            world.say(f"{who}: {name} raised {type(error).__name__}")
            self.observer.after(actor, step, None, failed=True)
            world.stop_here(f"after {name}")
            raise
        world.say(f"{who}: {name}")
        self.observer.after(actor, step, answer, failed=False)
        world.stop_here(f"after {name}")
        if world.troubled_by("lost reply"):
            world.say(f"{who}: the reply is lost")
            raise sa.exc.OperationalError(name, None, Exception("the server closed"), connection_invalidated=True)
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
    return as_text(World.current.clock)


def as_text(moment: datetime) -> str:
    """A time as SQLite keeps it."""
    return moment.strftime("%Y-%m-%d %H:%M:%S.%f")


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
