"""Replay: one run of a flow function from its top. Which step is which, and what history has of it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from uuid import UUID, uuid5

from celery_flows.store import FlowStep, FlowStepStatus, InvalidData
from celery_flows.tasks.errors import FlowCancelled, HistoryMismatch
from celery_flows.tasks.failures import failure_of
from celery_flows.tasks.interrupts import IN_PEACE, Interruptible
from celery_flows.tasks.payloads import Codec

if TYPE_CHECKING:
    from celery_flows.tasks.driver import Driver
    from celery_flows.tasks.undo import Undo

T = TypeVar("T")

MEMBER = "member"  # in what a step's row keeps: the name it was given by
FORK = "run.fork"  # the step that says how many steps of which flow were taken over


class Suspended(BaseException):
    """Unwinds a flow function that waits or lost its lease; another claim goes on. Not an Exception, so that the
    function's own ``except Exception`` lets it pass."""


class Place(NamedTuple):
    """Where in its flow a step stands: the same in every run of the function."""

    run_id: str
    name: str
    position: int  # from 1; 0 for a step that is known by its key, wherever it stands
    key: str | None = None
    gather: int | None = None  # of a gather's member: the place of the first of them
    member: str | None = None  # of a member that was given by name: that name

    @property
    def shown(self) -> str:
        """What it is called, for people."""
        return shown(self.name, self.member)

    def kept(self) -> dict[str, Any]:
        """What the step's row keeps of it besides, for a fork to go by."""
        kept = {"key": self.key, "gather": self.gather, MEMBER: self.member}
        return {name: value for name, value in kept.items() if value is not None}


class Replay:
    """The state of one run of a flow function, shared by all that :class:`Run` does for it."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.undos: list[Undo] = []
        self.undoing = False  # by itself, though it may go on
        self._inside: list[str] = []  # the steps that are running now; several are members of one gather
        self._is_taking = False  # a step of an async function
        self._promised: list[tuple[str, Coroutine[Any, Any, Any]]] = []  # steps of one that nobody has begun
        self.unwound_by: BaseException | None = None  # what went up an async function, or one of its tasks
        self._position = 0
        self._gather: int | None = None
        self._counts: dict[tuple[str | None, ...], int] = {}
        self._reached: set[str] = set()

    @property
    def flow_id(self) -> UUID:
        return self.driver.flow.id

    @property
    def cleaning(self) -> bool:
        """Whether the flow was told that it is cancelled, or past its deadline; or it has failed."""
        return self.driver.is_cleaning

    # ---- identity ----

    def place(self, name: str, key: str | None = None, member: str | None = None) -> Place:
        """The next step of this name: known by how many there were before, or by its key. One that is
        a ``member`` given by name is known by how many of both names there were before.

        Raises:
            InvalidData: it is taken inside another step, or the key was used before.
        """
        self.refuse_inside(f"step {name}")
        if key is None:
            run_id = run_id_of(self.flow_id, name, self.count(name, member), member)
        else:
            run_id = run_id_by(self.flow_id, name, key)
        if run_id in self._reached:
            raise InvalidData(f"step {name}", "has a key that an earlier step of this name has")
        self._reached.add(run_id)
        if key is not None:
            return Place(run_id, name, 0, key)
        self._position += 1
        return Place(run_id, name, self._position, gather=self._gather, member=member)

    @contextmanager
    def gathering(self, count: int) -> Iterator[None]:
        """While the places of a gather's members are taken."""
        self._gather = self._position + 1 if count > 1 else None
        try:
            yield
        finally:
            self._gather = None

    def refuse_inside(self, what: str) -> None:
        """Says nothing outside of steps.

        Raises:
            InvalidData: a step is running.
        """
        if self._inside:
            raise InvalidData(what, f"was taken inside step {self._inside[-1]}; steps do not nest")

    @contextmanager
    def taking(self, what: str) -> Iterator[None]:
        """While an async function takes a step.

        Raises:
            InvalidData: it takes another.
        """
        self.refuse_beside(what)
        self._is_taking = True
        try:
            yield
        finally:
            self._is_taking = False

    def refuse_beside(self, what: str) -> None:
        """Says nothing while no step is taken: which of two comes first would depend on how long they take.

        Raises:
            InvalidData: an async function takes one.
        """
        if self._is_taking:
            raise InvalidData(what, "came before another step had ended; await each, or gather them")

    def note_promised(self, what: str, step: Coroutine[Any, Any, Any]) -> None:
        """Keeps in mind a step that an async function has called for, and that begins when it is awaited."""
        self._promised = [each for each in self._promised if _waits_to_begin(each[1])]
        self._promised.append((what, step))

    def refuse_forgotten(self) -> None:
        """Says nothing if every step that the function has called for has begun. Without the await it would do
        nothing, and nobody would hear of it.

        Raises:
            InvalidData: one has not.
        """
        forgotten = [(what, step) for what, step in self._promised if _waits_to_begin(step)]
        for _, step in forgotten:
            step.close()  # it has been told of: Python's own warning would come later, and name no flow
        if forgotten:
            raise InvalidData(forgotten[0][0], "was not awaited, so it has done nothing; write await before it")

    def drawn_by(self) -> UUID:
        """The flow that identities and numbers are drawn for: this one, or, as far as its steps were taken over, the
        one that they were taken over from. They may have been drawn before a step that knows them."""
        fork = self.driver.history.get(run_id_of(self.flow_id, FORK, 1))
        for flow_id, steps in () if fork is None else fork.args_json["drawn"]:
            if len(self._reached) < steps:
                return UUID(flow_id)
        return self.flow_id

    def count(self, *names: str | None) -> int:
        """How often these names have come by now, from 1."""
        self._counts[names] = self._counts.get(names, 0) + 1
        return self._counts[names]

    def taken_with(self, place: Place, **told: Any) -> str | None:
        """What the step's row keeps of how it was taken, as JSON text: what its place does, whether it cleans up or
        undoes, and what is told."""
        kept = {**told, **place.kept(), **({"cleanup": True} if self.cleaning else {})}
        if self.undoing:
            kept["undoing"] = True
        return json.dumps(kept) if kept else None

    def find(self, place: Place, *, waits: bool = False) -> FlowStep | None:
        """What history has of this step. Where it has another one in that place, which the function has not come to, or
        one that ``waits`` where this one does not, the function is not the one that history was made by, and does not
        go on."""
        known = self.driver.history.get(place.run_id)
        # Members that have names may have changed places, so one that is known may hide that another is not.
        if known is None or place.member is not None:
            other = self.driver.recorded_at(place.position)
            if other is not None and other.run_id not in self._reached:
                self.driver.refuse_history(HistoryMismatch(_shown(other), place.shown, place.position))
        if known is not None and is_wait(known) != waits:
            self.driver.refuse_history(HistoryMismatch(known.task, f"{place.name}, which is another", place.position))
        return known

    def finish(self) -> None:
        """The function has ended: it must have come to all that history has."""
        for step in self.driver.history.values():
            if step.position and step.run_id not in self._reached:
                self.driver.refuse_history(HistoryMismatch(_shown(step), "the end", step.position))

    # ---- going on ----

    def begin(self) -> None:
        """Called before anything new happens, or a wait is taken up again: here a flow is told, once, that it is
        cancelled or past its deadline."""
        if not self.cleaning and (told := self.driver.to_be_told()) is not None:
            self.driver.is_cleaning = True
            raise told
        self.driver.check_stop()

    def may_begin(self) -> bool:
        """Whether :meth:`begin` would say nothing, and unwind nothing."""
        return self.driver.may_go_on() and (self.cleaning or not self.driver.has_to_tell())

    def tell_once(self, go_on: Callable[[], T]) -> T:
        """Goes on; a cancel that comes in the moment before tells the flow too, so what follows is cleanup."""
        try:
            return go_on()
        except FlowCancelled:
            self.driver.settle_before_telling()
            self.driver.is_cleaning = True
            raise

    def refuse_in_cleanup(self, name: str) -> None:
        """Waits are no part of cleaning up.

        Raises:
            InvalidData: the flow cleans up.
        """
        if self.cleaning:
            raise InvalidData(f"step {name}", "cannot wait: the flow cleans up")

    @contextmanager
    def inside(self, name: str, body: Callable[..., Any]) -> Iterator[None]:
        """While the step's own code, ``body``, runs."""
        self.driver.runtime.before_body(name, body)
        self._inside.append(name)
        try:
            yield
        finally:
            self._inside.remove(name)

    def interruptible(self) -> Interruptible:
        """How a step's own code may be interrupted: what cleans up or undoes is left in peace."""
        return IN_PEACE if self.cleaning or self.undoing else self.driver.interruptible()

    def outcome(self, step: FlowStep | None, codec: Codec | None) -> Any:
        """What a closed step came to: its result, or what it raised.

        Raises:
            StepFailed, FlowCancelled
        """
        assert step is not None
        if step.status is FlowStepStatus.SUCCEEDED:
            return step.result_json if codec is None else codec.decode(f"result of step {step.task}", step.result_json)
        if step.status is FlowStepStatus.CANCELLED:
            told = self.driver.to_be_told() or FlowCancelled(self.flow_id)
            self.driver.is_cleaning = True
            raise told
        raise failure_of(step.task, step.error_json)


def _waits_to_begin(step: Coroutine[Any, Any, Any]) -> bool:
    return inspect.getcoroutinestate(step) == inspect.CORO_CREATED


def is_wait(step: FlowStep) -> bool:
    """Whether the step is a wait, by what it was taken with."""
    return isinstance(step.args_json, Mapping) and not step.args_json.keys().isdisjoint(("at", "topic"))


def is_cleanup(step: FlowStep) -> bool:
    """Whether the step was taken to clean up."""
    return isinstance(step.args_json, Mapping) and bool(step.args_json.get("cleanup"))


def is_undoing(step: FlowStep) -> bool:
    """Whether the step was taken to clean up, or by ``run.undo()``."""
    return is_cleanup(step) or (isinstance(step.args_json, Mapping) and bool(step.args_json.get("undoing")))


def given_as(step: FlowStep) -> str | None:
    """The name by which the step was given as a member of several."""
    return step.args_json.get(MEMBER) if isinstance(step.args_json, Mapping) else None


def shown(name: str, member: str | None) -> str:
    """What a step of this name is called, for people: with the name it was given by as a member."""
    return name if member is None else f"{name} ({member})"


def _shown(step: FlowStep) -> str:
    return shown(step.task, given_as(step))


def run_id_of(flow_id: UUID, name: str, count: int, member: str | None = None) -> str:
    """The run id of the ``count``-th step of this name, or of both these names: the same in every run of this flow."""
    if member is not None:
        flow_id, name = uuid5(uuid5(flow_id, name), MEMBER), member
    return str(uuid5(flow_id, f"{name}#{count}"))


def run_id_by(flow_id: UUID, name: str, key: str) -> str:
    """The run id of the step of this name and key."""
    return str(uuid5(uuid5(flow_id, name), key))
