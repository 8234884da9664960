"""Crashes: the process of a worker dies at a step of the test's choice."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

import sqlalchemy as sa

from celery_flows.store import InvalidData, SqlFlowStore
from celery_flows.store.changes import Change, Completion, Holder
from celery_flows.store.dispatch import StepClaim, retry_step
from celery_flows.store.operations import Mode, change_made
from celery_flows.store.script import Call, Pause
from celery_flows.tasks.testing.asked import check_name, check_times
from celery_flows.tasks.testing.failures import tell_failure
from celery_flows.tasks.testing.names import is_meant

When = Literal["before", "during", "after"]


class Died(BaseException):
    """The process is dead: nothing it was about to do happens any more. Not an Exception, so nothing handles it."""


class DyingStore(SqlFlowStore):
    """The store of a process that may die: from then on it makes no further call."""

    dead = False

    def die(self) -> NoReturn:
        """The process dies."""
        self.dead = True
        raise Died

    def _perform(self, step: Call | Pause) -> Any:
        if self.dead:
            raise Died
        return super()._perform(step)


@dataclass
class _Crash:
    name: str
    when: When
    left: int

    def __str__(self) -> str:
        return f"flow_crash.at({self.name!r}, when={self.when!r})"


class FlowCrash:
    """Where workers are to die."""

    def __init__(self) -> None:
        self._crashes: list[_Crash] = []
        self._tasks: dict[str, list[str]] = {}  # step → the tasks whose body it was when it ran last

    def at(self, step: str, *, when: When = "during", times: int = 1) -> None:
        """The worker dies at the next step of this name: ``before`` its body runs; ``during`` it, which is after its
        body and before its record; or ``after`` its record.

        What it was doing stays leased until its lease ends; then another worker takes it over. The test fails if the
        crash does not strike.

        Args:
            step: the name of a function or task; of a task's, what follows the last dot is enough. A task's body as a
                plain step, ``run.step(task.run)``, goes by either name.
            times: how often in a row.

        Raises:
            InvalidData: ``when`` is none of the three, ``step`` is no name, or ``times`` is no number from 1.
        """
        check_name("flow_crash.at", step)
        check_times("flow_crash.at", times)
        if when not in get_args(When):
            raise InvalidData("when", f"is one of {', '.join(get_args(When))}")
        self._crashes.append(_Crash(step, when, times))

    # ---- for the kit ----

    def called(self, step: str, tasks: list[str]) -> None:
        """Says by what other names the step that is about to run may be meant."""
        self._tasks[step] = tasks

    def strikes(self, step: str, when: When) -> bool:
        """Whether the worker dies here, of a crash that is then spent."""
        names = [step, *self._tasks.get(step, [])]
        for crash in self._crashes:
            if crash.left and crash.when == when and any(is_meant(name, crash.name) for name in names):
                crash.left -= 1
                return True
        return False

    def spared(self) -> Iterator[tuple[str, str]]:
        """The crashes that have not struck as often as they were to: how they were asked for, and at which name."""
        return ((str(crash), crash.name) for crash in self._crashes if crash.left)


class CrashingStore(DyingStore):
    """A store whose process dies around the record of a step, where ``crash`` says so; notes what flows fail of."""

    def __init__(self, engine: sa.Engine, crash: FlowCrash) -> None:
        self._crash = crash
        self._tasks: dict[str, str] = {}  # run id of a Celery step → its task, as claimed
        self.failures: list[str] = []  # what flows failed of
        super().__init__(engine)

    def _perform(self, step: Call | Pause) -> Any:
        recorded: list[str] = []
        if isinstance(step, Call):
            step = self._watched(step, recorded)
        answer = super()._perform(step)
        if isinstance(answer, StepClaim):
            self._tasks[answer.holder.run_id] = answer.task
        for name in recorded:
            self._may_die(name, "after")
        return answer

    def _watched(self, call: Call, recorded: list[str]) -> Call:
        """The call; if it records a step's outcome, whatever that is, the process may die before it, and the step's
        name is added to ``recorded``."""

        def records(step: str | None) -> None:
            if step is not None:
                self._may_die(step, "during")
                recorded.append(step)

        what: Any = next(iter(call.args), None)
        if call.operation is change_made:  # what there is to record, is known within its transaction

            def made(connection: sa.Connection) -> Change:
                change: Change = what(connection)
                records(_recorded(change))
                return change

            return Call(call.operation, (made, *call.args[1:]), call.kwargs)
        if call.operation.mode in (Mode.WRITE, Mode.SINGLE):  # type: ignore[attr-defined]
            if isinstance(what, Change):
                self._note_failure(what)
                records(_recorded(what))
            elif isinstance(what, Completion):
                records(self._tasks.get(what.holder.run_id))
            elif isinstance(what, Holder) and call.operation is retry_step:
                records(self._tasks.get(what.run_id))
        return call

    def _note_failure(self, change: Change) -> None:
        error = sys.exception()  # a driver that records a failure is handling it
        if change.kind == "failed" and error is not None:
            self.failures.append(tell_failure(change.flow_id, error))

    def _may_die(self, step: str, when: When) -> None:
        if self._crash.strikes(step, when):
            self.die()


def _recorded(change: Change) -> str | None:
    """The step whose attempt this change records the outcome of."""
    step = change.step
    if step is not None and (step.status.is_terminal or change.kind == "step_retrying"):
        return step.task
    return None
