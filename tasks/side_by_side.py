"""Async functions side by side: the members of a gather that run here, each in a task of the drive's event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from celery_flows.store import InvalidData
from celery_flows.tasks.errors import StepFailed
from celery_flows.tasks.inline import Again, Attempts, InlineStep, retry_at
from celery_flows.tasks.loop import end, spawn
from celery_flows.tasks.replay import Replay


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One of them, which is not closed."""

    number: int
    step: InlineStep
    attempts: Attempts


class SideBySide:
    """The members of one gather. Their places are taken; what each comes to is recorded as it comes to it.

    Every attempt is a task of its own. Between them one coroutine decides: which may begin, and, when nothing runs any
    more, whether the flow waits for those that are to be tried again, is told something, or goes on. So nothing is told
    beside a running member, and the flow is not parked beside one.
    """

    def __init__(
        self, replay: Replay, steps: Mapping[int, InlineStep], at_once: int | None, *, collects_failures: bool
    ) -> None:
        self._replay, self._driver = replay, replay.driver
        self._at_once, self._collects_failures = at_once, collects_failures
        self._results: dict[int, Any] = {}
        self._failures: dict[int, StepFailed] = {}
        self._waiting: deque[Member] = deque()
        self._paused: list[tuple[datetime, Member]] = []  # to be tried again, and when
        self._running: dict[asyncio.Task[str | Again | BaseException | None], Member] = {}  # in the order they began
        for number, step in steps.items():
            self._look_up(number, step)

    def results(self) -> dict[int, Any]:
        """What they came to, by number; a StepFailed for a failure, if failures are collected.

        Raises:
            StepFailed: the first of them, in order, that failed for good, once all that had begun have ended; then none
                begins.
        """
        if self._goes_on:
            self._driver.loop.run(self._play())
        if self._is_decided:
            raise self._failures[min(self._failures)]
        return self._results | self._failures

    @property
    def _is_decided(self) -> bool:
        return bool(self._failures) and not self._collects_failures

    @property
    def _goes_on(self) -> bool:
        return bool(self._waiting or self._paused) and not self._is_decided

    def _look_up(self, number: int, step: InlineStep) -> None:
        known = step.known()
        if known is not None and known.status.is_terminal:
            try:
                self._results[number] = step.outcome(known)
            except StepFailed as failed:
                self._failures[number] = failed
            return
        member = Member(number, step, step.attempts(known))
        if known is not None and (at := retry_at(known)) is not None:
            self._paused.append((at, member))
        else:
            self._waiting.append(member)

    # ---- in the loop ----

    async def _play(self) -> None:
        try:
            while self._running or self._goes_on:
                self._begin_what_may()
                if self._running:
                    await self._until_one_ends()
                else:
                    await spawn(self._rest)
        finally:  # what ends one of them may end the claim: no other goes on
            await end(self._running)

    def _begin_what_may(self) -> None:
        now = self._driver.now()
        self._waiting += [member for at, member in self._paused if at <= now]
        self._paused = [(at, member) for at, member in self._paused if at > now]
        while self._waiting and self._has_room and self._may_begin():
            member = self._waiting.popleft()
            self._running[asyncio.create_task(self._attempt(member))] = member

    @property
    def _has_room(self) -> bool:
        return self._at_once is None or len(self._running) < self._at_once

    def _may_begin(self) -> bool:
        return not self._is_decided and self._replay.may_begin()

    async def _attempt(self, member: Member) -> str | Again | BaseException | None:
        """What an attempt comes to, if only an exception: a task that raises SystemExit would end the loop."""
        try:
            return await spawn(partial(self._once, member))
        except BaseException as error:
            return error

    def _once(self, member: Member) -> str | Again | None:
        if not self._may_begin():  # because of what another has come to, or seen, meanwhile
            return None
        return member.attempts.once(member.attempts.recording(member.step.body))

    async def _until_one_ends(self) -> None:
        next_at = min((at for at, _ in self._paused), default=None)
        seconds = None if next_at is None else max(0.0, (next_at - self._driver.now()).total_seconds())
        done, _ = await asyncio.wait(self._running, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in [task for task in self._running if task in done]:
            self._settle(self._running.pop(task), task.result())

    def _settle(self, member: Member, outcome: str | Again | BaseException | None) -> None:
        match outcome:
            case None:
                self._waiting.append(member)
            case str():
                self._results[member.number] = member.step.read(outcome)
            case Again(step, pause):
                self._paused.append((self._driver.note_retry(step, pause), member))
            case StepFailed():
                self._failures[member.number] = outcome
            case asyncio.CancelledError():
                raise InvalidData(f"step {member.step.place.name}", "has cancelled its own task") from outcome
            case _:
                raise outcome

    def _rest(self) -> None:
        """Nothing runs: the flow may be told, and may be parked."""
        self._replay.begin()
        if not self._waiting:
            self._driver.pause_until(min(at for at, _ in self._paused))
