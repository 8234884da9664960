"""Gather: several steps side by side, joined by counters in the store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar
from uuid import UUID

from celery import Signature

from celery_flows.store import FlowStep, FlowStepStatus, InvalidData
from celery_flows.store.changes import Join, Member, StepWrite
from celery_flows.tasks.awaited import Awaited, Decision, Event, awaiting, give_back
from celery_flows.tasks.children import ChildFlow, check_depth, child_member
from celery_flows.tasks.errors import FlowCancelled, StepFailed
from celery_flows.tasks.failures import is_of_engine
from celery_flows.tasks.inline import InlineStep
from celery_flows.tasks.members import codec_of, member_name, member_of
from celery_flows.tasks.options import StepOptions, options_of
from celery_flows.tasks.payloads import Codec
from celery_flows.tasks.replay import Place, Replay
from celery_flows.tasks.side_by_side import SideBySide
from celery_flows.tasks.work import Work, check_member, is_remote

Which = TypeVar("Which", int, str)
T = TypeVar("T")


class First(NamedTuple, Generic[Which, T]):
    """What came first of several."""

    which: Which  # its number in what was given, from 0, or the name it was given by
    value: T


@dataclass(frozen=True, slots=True)
class How:
    """What a gather waits for."""

    collects_failures: bool = False  # all are waited for, whatever they come to
    first_only: bool = False  # the first success is enough
    at_once: int | None = None  # so many are out at a time


class Gather:
    """One gather of a flow function, under this claim."""

    def __init__(
        self, replay: Replay, options: StepOptions, works: Sequence[Work], how: How, names: Sequence[str] | None = None
    ) -> None:
        self._replay, self._driver = replay, replay.driver
        self._options, self._works, self._how, self._names = options, works, how, names
        if how.at_once is not None and (type(how.at_once) is not int or how.at_once < 1):
            raise InvalidData("gather limit", "must be a whole number from 1")
        self.check(works, options)
        self._remote = [n for n, work in enumerate(works) if is_remote(work)]
        with replay.gathering(len(works)):
            self._places = [self._place(n, work) for n, work in enumerate(works)]
            self._local = {
                n: InlineStep(replay, options, work, (), {})
                for n, work in enumerate(works)
                if not isinstance(work, Signature | ChildFlow | Awaited)
            }  # their places, too, are taken before any of them begins: which comes first must not depend on time

    @staticmethod
    def check(works: Sequence[Work], options: StepOptions) -> None:
        """Says nothing if these can be gathered with these options.

        Raises:
            InvalidData: they cannot.
        """
        for work in works:
            check_member(work)
        if options.key and len(works) > 1:
            raise InvalidData("step key", "is of one step, not of a gather")
        if options.name and any(map(is_remote, works)):
            raise InvalidData("step name", "is of plain functions: Celery steps and child flows have theirs")

    def _place(self, n: int, work: Work) -> Place | None:
        """Where a member stands that runs elsewhere; one that runs here finds its own place."""
        if not is_remote(work):
            return None
        named = None if self._names is None else self._names[n]
        return self._replay.place(member_name(work), self._options.key, named)

    def results(self) -> list[Any]:
        """The results in order.

        Raises:
            StepFailed: the first of them, in order, that failed for good, unless failures are collected.
        """
        inline = self._inline()
        known = self._known()
        has_failed = any(step is not None and step.status is FlowStepStatus.FAILED for step in known.values())
        if has_failed and not self._how.collects_failures:
            self._replay.outcome(self._first_failure(), None)
        if any(step is None or not step.status.is_terminal for step in known.values()):
            self._join(known)
        return [inline[n] if n in inline else self._outcome(n, known[n]) for n in range(len(self._works))]

    @property
    def is_all_remote(self) -> bool:
        """Whether there are members, and all of them run elsewhere."""
        return 0 < len(self._remote) == len(self._works)

    def first(self) -> First[Any, Any]:
        """Which member succeeded first, and its result. Which one that was is recorded, by its number or name, for
        later ones may look as early. The others that nobody has begun are cancelled; those that run go on; events that
        came for others are given back.

        Raises:
            StepFailed: all have failed; the last of them in order.
        """
        place = self._replay.place("first")
        which: Sequence[int | str] = self._names or range(len(self._works))
        self._known()  # is refused where it is of other names
        if (chosen := self._replay.find(place)) is not None:
            winner = which.index(self._replay.outcome(chosen, None))
        else:
            winner = self._winner()
            self._record(place, json.dumps(which[winner]))
        self._end_the_others(winner)
        return First(which[winner], self._outcome(winner, self._known()[winner]))

    def _end_the_others(self, winner: int) -> None:
        """Done once, and after it is recorded who has won: no event must be given back and taken, too."""
        place = self._replay.place("first.end_others")
        if self._replay.find(place) is not None:
            return
        self._driver.cancel_idle_members()
        events = [n for n, work in enumerate(self._works) if n != winner and isinstance(work, Event | Decision)]
        losers = (step for n in events if (step := self._known()[n]) is not None and step.child_session_key)
        give_back(self._driver.runtime, [UUID(str(step.child_session_key)) for step in losers])
        self._record(place, "null")

    def _record(self, place: Place, result: str) -> None:
        args = self._replay.taken_with(place)
        step = StepWrite(place.run_id, place.name, FlowStepStatus.SUCCEEDED, place.position, result=result, args=args)
        self._driver.record(step, current_step=place.name)

    def _winner(self) -> int:
        known = self._known()
        good = [(step.updated_at, n) for n, step in known.items() if step and step.status is FlowStepStatus.SUCCEEDED]
        if good:
            return min(good)[1]
        if any(step is None or not step.status.is_terminal for step in known.values()):
            self._join(known)
        self._replay.outcome(known[self._remote[-1]], None)
        raise AssertionError("a member that is closed and has not succeeded has no result")

    # ---- members ----

    def _known(self) -> dict[int, FlowStep | None]:
        return {n: self._replay.find(place) for n in self._remote if (place := self._places[n]) is not None}

    def _inline(self) -> dict[int, Any]:
        """The results of members that run here: plain functions one after the other, then async ones side by side."""
        plain = {n: self._plain(step) for n, step in self._local.items() if not step.is_async}
        beside = {n: step for n, step in self._local.items() if step.is_async}
        collects = self._how.collects_failures
        return plain | SideBySide(self._replay, beside, self._how.at_once, collects_failures=collects).results()

    def _plain(self, step: InlineStep) -> Any:
        try:
            return step.result()
        except StepFailed as failed:
            if not self._how.collects_failures:
                raise
            return failed

    def _outcome(self, n: int, step: FlowStep | None) -> Any:
        try:
            return self._replay.outcome(step, self._codec(n))
        except StepFailed as failed:
            if not self._how.collects_failures:
                raise
            return failed

    def _codec(self, n: int) -> Codec | None:
        work = self._works[n]
        return codec_of(self._driver.app, work) if is_remote(work) else None

    def _first_failure(self) -> FlowStep:
        """Of a join that has failed, the first member that did, once all are closed: what handles the failure must not
        run beside members, and which failure is told must not depend on when it is asked."""
        if any(step is not None and not step.status.is_terminal for step in self._known().values()):
            self._driver.settle_members()
        members = [step for step in self._known().values() if step is not None]
        failed = [step for step in members if step.status is FlowStepStatus.FAILED]
        # Children that were cancelled because of the failure are not the failure.
        return next((step for step in failed if not is_of_engine(FlowCancelled, step.error_json)), failed[0])

    # ---- the join ----

    def _join(self, known: dict[int, FlowStep | None]) -> None:
        """Schedules the members that may be out now, and suspends the flow until enough of them are closed."""
        missing = [n for n, step in known.items() if step is None]
        self._replay.begin()
        is_out = sum(step is not None and not step.status.is_terminal for step in known.values())
        room = len(missing) if self._how.at_once is None else max(0, self._how.at_once - is_out)
        members = [self._member(n) for n in missing[:room]]
        is_out += len(members)
        good, bad = self._wanted(is_out, left=len(missing) - len(members))
        # Members of one gather are one group, however many times some are scheduled: a wake that came since the claim
        # is not lost, for once the counters are met each further completion is a wake.
        goes_on = any(step is not None for step in known.values())
        join = Join(self._driver.join_group + (not goes_on), good, bad)
        cleanup = self._replay.cleaning
        self._replay.tell_once(lambda: self._driver.join(members, join, cleanup=cleanup))

    def _wanted(self, out: int, *, left: int) -> tuple[int, int]:
        """Of ``out`` members: how many successes, or more than how many failures, call the driver. With more of them
        ``left`` it is called a few at a time, so that always about as many are out as may be."""
        enough = max(1, out // 4) if left else out
        if self._how.first_only:
            return 1, out - 1
        return enough, (enough - 1 if left else out) if self._how.collects_failures else 0

    def _member(self, n: int) -> Member:
        work, place = self._works[n], self._places[n]
        assert place is not None
        if isinstance(work, Awaited):
            self._replay.refuse_in_cleanup(place.name)
            return replace(
                self._child(place, awaiting(self._driver, work)), queue=self._driver.queue
            )  # it knows our code
        if isinstance(work, ChildFlow):
            return self._child(place, work)
        assert isinstance(work, Signature)
        options = self._options.over(options_of(_function(self._driver.app, work))).over(self._driver.defaults)
        return member_of(
            self._driver.app, place, work, options, self._driver.max_payload_bytes, cleanup=self._replay.cleaning,
            undoing=self._replay.undoing,
        )  # fmt: skip

    def _child(self, place: Place, child: ChildFlow[Any]) -> Member:
        if self._options.retry is not None:
            raise InvalidData("step retry", "is not of child flows: their own steps are tried again")
        check_depth(self._driver.lineage, child.definition.name)
        timeout = self._options.timeout or child.definition.timeout
        deadline = None if timeout is None else self._driver.now() + timeout
        return child_member(self._driver.flow, place, child, deadline, cleanup=self._replay.cleaning)


def _function(app: Any, work: Any) -> Any:
    return getattr(app.tasks.get(work.task), "run", None)
