"""The steps of the soak's flows: bodies that leave a line in the effect log as they begin and end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from celery import Celery, Task

from celery_flows import Run
from celery_flows.tasks.replay import run_id_of
from tests.soak.application import ELSEWHERE, FAILURES, HERE, RETRY_SECONDS, SHORT
from tests.support.effects import EffectLog


@dataclass(frozen=True)
class Bodies:
    """What a step may run: inline, as a Celery task, and as tasks that fail at first and are tried again."""

    work: Callable[..., str]
    elsewhere: Task[Any, str]
    retried: Task[Any, str]  # by autoretry_for
    retries: Task[Any, str]  # by itself


class Steps:
    """One pass over a flow function: takes inline steps that know their own run ids, as Celery steps do."""

    def __init__(self, run: Run, work: Callable[..., str]) -> None:
        self._run, self._work, self._taken = run, work, 0

    def __call__(self, label: str, seconds: float = SHORT, **how: bool) -> str:
        self._taken += 1
        run_id = run_id_of(self._run.flow_id, HERE, self._taken)
        return self._run.step(self._work, str(self._run.flow_id), run_id, label, seconds, **how)


def define_bodies(app: Celery, effects: EffectLog) -> Bodies:
    """The bodies, and the app's tasks."""

    def leave(effect: str, **more: Any) -> None:
        effects.append(effect, at=time.time(), **more)

    def perform(
        flow_id: str, run_id: str | None, label: str, seconds: float, *, inline: bool, fails: bool = False
    ) -> str:
        """A body: says that it begins, takes its time, says that it has ended."""
        about = {"flow": flow_id, "run_id": run_id, "label": label, "inline": inline}
        leave("began", **about)
        time.sleep(seconds)
        if fails:
            leave("failed", **about)
            raise ValueError(label)
        leave("ended", **about)
        return label

    def work(flow_id: str, run_id: str, label: str, seconds: float, fails: bool = False) -> str:
        return perform(flow_id, run_id, label, seconds, inline=True, fails=fails)

    @app.task(name=ELSEWHERE, bind=True, shared=False)
    def elsewhere(self: Task[Any, Any], flow_id: str, label: str, seconds: float = SHORT, fails: bool = False) -> str:
        return perform(flow_id, self.request.id, label, seconds, inline=False, fails=fails)

    again = {"max_retries": FAILURES + 1, "countdown": RETRY_SECONDS}

    @app.task(name=f"{ELSEWHERE}.retried", bind=True, shared=False, autoretry_for=(ValueError,), retry_kwargs=again)
    def retried(self: Task[Any, Any], flow_id: str, label: str) -> str:
        fails = self.request.retries < FAILURES
        return perform(flow_id, self.request.id, label, SHORT, inline=False, fails=fails)

    @app.task(name=f"{ELSEWHERE}.retries", bind=True, shared=False)
    def retries(self: Task[Any, Any], flow_id: str, label: str) -> str:
        try:
            fails = self.request.retries < FAILURES
            return perform(flow_id, self.request.id, label, SHORT, inline=False, fails=fails)
        except ValueError as error:
            raise self.retry(exc=error, max_retries=FAILURES + 1, countdown=RETRY_SECONDS) from error

    return Bodies(work, elsewhere, retried, retries)
