"""Run: what a flow function is handed. Each of its methods is a recorded step."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Concatenate, Literal, NoReturn, ParamSpec, TypeVar, cast, overload
from uuid import UUID, uuid5

from celery import Signature, Task
from sqlalchemy.orm import Session

from celery_flows.store import InvalidData
from celery_flows.store.clock import as_utc
from celery_flows.store.validation import check_list, check_name, encode_json
from celery_flows.tasks import wait_steps
from celery_flows.tasks.approval import Approval, approval_key
from celery_flows.tasks.children import ChildFlow
from celery_flows.tasks.errors import FlowCancelled, FlowTimedOut, StepFailed
from celery_flows.tasks.gather import First, Gather, How
from celery_flows.tasks.inline import run_inline
from celery_flows.tasks.options import StepOptions
from celery_flows.tasks.replay import Replay
from celery_flows.tasks.retry import Retry
from celery_flows.tasks.transact import run_transaction
from celery_flows.tasks.undo import Undo
from celery_flows.tasks.work import Work, check_definition, check_function

if TYPE_CHECKING:
    from celery_flows.tasks.registry import FlowDefinition

P = ParamSpec("P")
T = TypeVar("T")
In = TypeVar("In")
Out = TypeVar("Out")


class Run:
    """The flow's own view of itself.

    Between steps a flow function may run again from the top, after a wait or a crash: recorded results are read back,
    and the first step without one is where it goes on. So it must not act outside steps, and must come to the same
    steps in the same order when their results are the same.
    """

    def __init__(self, replay: Replay, options: StepOptions | None = None) -> None:
        self._replay = replay
        self._options = options or StepOptions()
        self.flow_id: UUID = replay.flow_id
        self.owner: str = replay.driver.flow.owner_session_key
        self.logger = logging.LoggerAdapter(logging.getLogger("celery_flows.run"), {"flow_id": str(self.flow_id)})

    # ---- steps ----

    def options(
        self,
        *,
        name: str | None = None,
        retry: Retry | None = None,
        timeout: timedelta | None = None,
        key: str | None = None,
    ) -> Run:
        """This run, with options for the step that is taken by it: ``run.options(timeout=…).step(charge, order)``. They
        go before the function's own (:func:`~celery_flows.step`), and those before the flow's.

        Args:
            name: what the step is called; a plain function's own name by default.
            retry: how often and when it is tried again.
            timeout: how long one attempt may take. Past it a plain function, and a Celery task under prefork and solo,
                is interrupted and has failed with :class:`StepTimedOut`; in a thread it is judged when it ends. An
                async function is cancelled where it awaits, in a thread too.
            key: the step's identity, with its name, in place of how many of that name came before it.

        Raises:
            InvalidData: naming the option.
        """
        return Run(self._replay, StepOptions(name, retry, timeout, key).over(self._options))

    @overload
    def step(self, work: Signature[T], /) -> T: ...
    @overload
    def step(self, work: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    @overload
    def step(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    def step(self, work: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Does a unit of work once and records its result; when replayed, reads it back.

        A function runs here; one that is async, in an event loop of this drive. A Celery task or signature runs as a
        Celery task of its own, on its own queue, while this worker does something else.

        Raises:
            StepFailed: it failed for good, now or in the run that is replayed.
            InvalidData: arguments or result cannot be JSON, or this is nothing that can run.
        """
        if isinstance(work, Task | Signature):
            return self._gather([_signature("step", work, args, kwargs)], How())[0]
        check_function("step", work)
        return run_inline(self._replay, self._options, work, args, kwargs)

    def transaction(self, work: Callable[Concatenate[Session, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a function with a SQLAlchemy Session on the store's database, and commits what it wrote together with
        the step's record: exactly once, whatever crashes. It is run again after a rollback, so it must write through
        the session only. It has ten seconds between two statements, as every transaction here.

        Raises:
            StepFailed: it failed for good; nothing of it was written.
            InvalidData: the result cannot be JSON.
        """
        check_function("transaction", work)
        return cast("T", run_transaction(self._replay, self._options, work, args, kwargs))

    def flow(self, definition: FlowDefinition[In, Out], input: In | None = None, /) -> Out:
        """Runs another flow as a step of this one, with this one's owner, and gives its result. If this flow is
        cancelled, so is that one, before this one cleans up.

        Raises:
            StepFailed: it failed or was cancelled.
            InvalidData: the input is not what it takes, or cannot be JSON.
        """
        check_definition("flow", definition)
        return cast("Out", self._gather([definition.s(input)], How())[0])

    @overload
    def gather(
        self,
        members: Iterable[Signature[T] | ChildFlow[T] | Callable[[], Coroutine[Any, Any, T]]],
        *,
        limit: int | None = None,
    ) -> list[T]: ...
    @overload
    def gather(
        self, members: Iterable[Signature[T] | ChildFlow[T] | Callable[[], T]], *, limit: int | None = None
    ) -> list[T]: ...
    @overload
    def gather(
        self,
        members: Iterable[Signature[T] | ChildFlow[T] | Callable[[], Coroutine[Any, Any, T]]],
        *,
        return_exceptions: Literal[True],
        limit: int | None = None,
    ) -> list[T | StepFailed]: ...
    @overload
    def gather(
        self,
        members: Iterable[Signature[T] | ChildFlow[T] | Callable[[], T]],
        *,
        return_exceptions: Literal[True],
        limit: int | None = None,
    ) -> list[T | StepFailed]: ...
    @overload
    def gather(
        self, members: Iterable[Work], *, return_exceptions: bool = False, limit: int | None = None
    ) -> list[Any]: ...
    def gather(
        self, members: Iterable[Work], *, return_exceptions: bool = False, limit: int | None = None
    ) -> list[Any]:
        """Runs Celery signatures (``task.s(…)``), flows (``definition.s(input)``) and functions without arguments
        (``partial(function, …)``), each a step, and gives their results in order.

        Signatures and flows run side by side. Functions run here, before them: plain ones one after the other, then
        async ones side by side.

        Args:
            return_exceptions: waits for all, and gives a :class:`StepFailed` in place of a result that there is not.
            limit: how many signatures and flows may be out at once, and how many async functions may run.

        Raises:
            StepFailed: the first of them, in order, that failed for good, once all that had begun have ended.
            InvalidData: arguments cannot be JSON; none was scheduled.
        """
        return self._gather(members, How(collects_failures=return_exceptions, at_once=limit))

    @overload
    def first(self, members: Iterable[Signature[T] | ChildFlow[T]], /) -> First[int, T]: ...
    @overload
    def first(self, members: Iterable[Work], /) -> First[int, Any]: ...
    @overload
    def first(self, /, **members: Signature[T] | ChildFlow[T]) -> First[str, T]: ...
    @overload
    def first(self, /, **members: Work) -> First[str, Any]: ...
    def first(self, members: Iterable[Any] | None = None, /, **named: Any) -> First[Any, Any]:
        """Runs Celery signatures and flows, and waits for :class:`Event`, :class:`Decision` and :class:`Timer`, side by
        side; gives the number, from 0, and the result of the one that succeeds first. Members that are given by name
        (``first(paid=Event(…), late=Timer(…))``) have it in place of the number. They are known by it, so they may
        change places, but not names, in flows that have come to them.

        The others are cancelled if nobody has begun them; else they go on, and are recorded if they end before the
        flow. An event that came for another all the same is given back: who waits for it next has it.

        Raises:
            StepFailed: all of them failed.
            InvalidData: there are none, or arguments cannot be JSON; none was scheduled. Or some have names and some
                have none. Or the flow cleans up, where nothing is waited for.
        """
        if named and members is not None:
            raise InvalidData("first", "takes its members in a list, or by name: give all a name, or none")
        if named and self._options.key is not None:
            raise InvalidData("step key", "is not of members that have names: they are known by these")
        names = [check_name("name of a member", name) for name in named] or None
        works = list(named.values()) if members is None else check_list("first", members)
        gather = Gather(self._replay, self._options, works, How(first_only=True), names)
        if not gather.is_all_remote:
            raise InvalidData("first", "takes one or more of task.s(…), flow.s(…), Event, Decision and Timer")
        return gather.first()

    def _gather(self, members: Iterable[Work], how: How) -> list[Any]:
        return Gather(self._replay, self._options, check_list("gather", members), how).results()

    # ---- undoing ----

    @overload
    def on_failure(self, undo: Signature[Any], /) -> None: ...
    @overload
    def on_failure(self, undo: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs) -> None: ...
    def on_failure(self, undo: Any, /, *args: Any, **kwargs: Any) -> None:
        """What undoes what has been done until here, should the flow fail or be cancelled: a function or a Celery
        task, run as a step, retried as steps are. The latest comes first. One that fails is reported with the flow's
        error, and the others are run all the same.
        """
        self._replay.refuse_inside("on_failure")
        if isinstance(undo, Task | Signature):
            undo, args, kwargs = _signature("on_failure", undo, args, kwargs), (), {}
            Gather.check([undo], self._options)
        else:
            check_function("on_failure", undo)
        self._replay.undos.append(Undo(self._options, undo, args, kwargs))

    def undo(self) -> list[str]:
        """Runs what :meth:`on_failure` was told, the latest first, and gives the names of those that failed. The flow
        does so by itself when it fails or is cancelled; here for a function that means to go on.
        """
        self._replay.undoing = True
        try:
            return self._undo()
        finally:
            self._replay.undoing = False

    def _undo(self) -> list[str]:
        failed = []
        while self._replay.undos:
            undo = self._replay.undos[-1]  # it stays until it is closed: a cancel may come first
            step = Run(self._replay, undo.options).step
            try:
                step(undo.work, *undo.args, **undo.kwargs)
            except StepFailed as failure:
                failed.append(failure.step)
            except Exception as error:
                if not self._replay.cleaning or isinstance(error, FlowCancelled | FlowTimedOut):
                    raise
                failed.append(f"{undo.name} ({type(error).__name__})")  # it could not even begin
            self._replay.undos.pop()
        return failed

    def clean_up(self) -> list[str]:
        """:meth:`undo` in the end, where nothing can be waited for any more. For the driver."""
        self._replay.driver.is_cleaning = True
        return self.undo()

    # ---- waits ----

    def sleep(self, duration: timedelta) -> None:
        """Waits without a worker, for seconds or months, by the database's clock.

        Raises:
            InvalidData: it is no timedelta, or ends past ``flow_timer_horizon_days`` or the year 9999.
        """
        self._without_options()
        wait_steps.sleep(self._replay, lambda: wait_steps.after(self._replay, "duration", duration))

    def sleep_until(self, at: datetime) -> None:
        """Waits without a worker until an aware time; a time that has passed is no wait.

        Raises:
            InvalidData: the time is naive.
        """
        self._without_options()
        moment = as_utc("at", at)
        wait_steps.sleep(self._replay, lambda: moment)

    def wait_for(self, topic: str, correlation_id: str, *, timeout: timedelta | None = None) -> Any:
        """Waits without a worker for an external event, and gives its payload. One that came before is taken at once;
        several are handed over first in, first out.

        Raises:
            WaitTimedOut: it did not come in time.
            InvalidData: topic or correlation id is empty or too long.
        """
        self._without_options()
        check_name("topic", topic)
        check_name("correlation_id", correlation_id)
        return wait_steps.wait_for(self._replay, wait_steps.name_of_wait(topic), topic, correlation_id, timeout)

    def approval(self, name: str, *, timeout: timedelta | None = None) -> Approval:
        """Waits without a worker until somebody decides (``handle.approve(name, by=…)``, ``handle.reject(…)``), and
        gives who, when, and what.

        Raises:
            WaitTimedOut: nobody did in time.
            InvalidData: the name is empty or too long, or what was emitted by hand is no approval.
        """
        self._without_options()
        topic, correlation_id = approval_key(self.flow_id, name)
        payload = wait_steps.wait_for(self._replay, topic, topic, correlation_id, timeout)
        try:
            return Approval.model_validate(payload)
        except ValueError:
            raise InvalidData(f"approval {name}", "is none: approve with handle.approve(name, by=…)") from None

    # ---- what is recorded besides ----

    def update(self, /, **state: Any) -> None:
        """Lays these keys over the flow's state, where ``handle.state()`` sees them at once: progress, for people and
        programs that look on. Done once, as a step is; the flow itself should not read it.

        Raises:
            InvalidData: a value cannot be JSON.
        """
        self._without_options()
        encode_json("state", state)
        place = self._replay.place("update")
        if self._replay.find(place) is None:
            self._replay.begin()
            self._replay.driver.update_state(place, state, self._replay.taken_with(place))

    def restart_as(self, input: Any = None) -> NoReturn:
        """Ends this flow, and has a new one go on for it: same definition in its latest version, same owner and key,
        this input, a fresh history. For flows without an end, whose history would grow for ever. Does not return; what
        :meth:`on_failure` was told is forgotten. Handles of this flow speak for the one that goes on.

        Raises:
            InvalidData: the input is not what the flow takes, or cannot be JSON; or this is a child flow, or cleans up.
        """
        self._without_options()
        self._replay.begin()
        self._replay.refuse_in_cleanup("restart_as")
        self._replay.finish()
        self._replay.tell_once(lambda: self._replay.driver.continue_as(input))
        raise AssertionError("the driver suspends")

    def now(self) -> datetime:
        """The time, in UTC by the database's clock; recorded, so that a replay sees the same."""
        self._without_options()
        return cast("datetime", run_inline(self._replay, StepOptions(name="now"), self._replay.driver.now, (), {}))

    def uuid(self) -> UUID:
        """A new UUID; when replayed the same one. Derived from the flow's id, so it costs no record."""
        self._without_options()
        self._replay.refuse_inside("run.uuid()")
        return uuid5(self._replay.drawn_by(), f"uuid {self._replay.count('run.uuid()')}")

    def random(self) -> float:
        """A random number from 0 to below 1; when replayed the same one. It costs no record, as :meth:`uuid`."""
        self._without_options()
        self._replay.refuse_inside("run.random()")
        seed = uuid5(self._replay.drawn_by(), f"random {self._replay.count('run.random()')}")
        return random.Random(str(seed)).random()

    def _without_options(self) -> None:
        if self._options != StepOptions():
            raise InvalidData("run.options()", "is for step, transaction, flow, gather, first and on_failure")


def _signature(what: str, work: Task[..., Any] | Signature[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if isinstance(work, Task):
        return work.s(*args, **kwargs)
    if args or kwargs:
        raise InvalidData(what, "is given arguments beside a signature, which has its own: write task.s(…) with all")
    return work
