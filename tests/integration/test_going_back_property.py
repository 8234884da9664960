"""Whatever a flow did: a fork at any of its steps begins with just what stands before that step, and ends the same."""

from __future__ import annotations

from functools import partial
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from celery_flows import FlowHandle, Run, StepFailed
from celery_flows.store import FlowStep, audit
from celery_flows.tasks.replay import FORK, run_id_by, run_id_of
from tests.support.bench import Bench

NAMES = st.sampled_from(("a", "b"))
WORK = st.tuples(st.sampled_from(("inline", "remote", "transaction", "child")), NAMES, st.booleans())
GATHER = st.tuples(st.just("gather"), st.lists(st.tuples(NAMES, st.booleans()), min_size=1, max_size=4), st.booleans())
OTHER = st.tuples(st.sampled_from(("update", "now", "sleep")), NAMES, st.just(False))
KEYED = st.tuples(st.just("keyed"), WORK, st.booleans())
PROGRAMS = st.lists(st.one_of(WORK, GATHER, OTHER, KEYED), min_size=1, max_size=6)

KEPT = (
    "task", "status", "position", "attempt", "result_json", "error_json", "args_json", "created_at", "updated_at",
)  # fmt: skip


class Programs:
    """A flow that does what its input says, handles what fails, and notes at which place it came to each action."""

    def __init__(self, bench: Bench) -> None:
        self.came_to_at: dict[int, int] = {}  # number of an action → places before it
        self._task = bench.task("remote")(self._body)
        self._child = bench.flows.flow("child")(self._child_body)
        self.flow = bench.flows.flow("program")(self._program)

    @staticmethod
    def _body(name: str, fails: bool) -> str:
        if fails:
            raise RuntimeError(name)
        return name

    def _write(self, session: Session, name: str, fails: bool) -> str:
        return self._body(name, fails)

    def _child_body(self, run: Run, asked: tuple[str, bool]) -> str:
        return self._body(*asked)

    def _program(self, run: Run, actions: list[Any]) -> list[str]:
        came_to = []
        for number, (kind, what, flag) in enumerate(actions):
            self.came_to_at[number] = run._replay._position
            try:
                came_to.append(repr(self._act(run, number, kind, what, flag)))
            except StepFailed as failed:
                came_to.append(str(failed))
        return came_to

    def _act(self, run: Run, number: int, kind: str, what: Any, flag: bool) -> Any:
        if kind == "keyed":
            return self._work(run.options(key=f"key {number}"), *what)
        if kind == "gather":
            members = [self._task.s(*each) if n % 2 else partial(self._body, *each) for n, each in enumerate(what)]
            return list(map(str, run.gather(members, return_exceptions=True, limit=2 if flag else None)))
        if kind == "update":
            return run.update(**{what: number})
        if kind == "now":
            return run.now() is None
        if kind == "sleep":
            return run.sleep_until(run.now())
        return self._work(run, kind, what, flag)

    def _work(self, run: Run, kind: str, name: str, fails: bool) -> Any:
        if kind == "inline":
            return run.options(name=name).step(self._body, name, fails)
        if kind == "transaction":
            return run.transaction(self._write, name, fails)
        return run.flow(self._child, (name, fails)) if kind == "child" else run.step(self._task, name, fails)

    def is_before(self, other: FlowStep, step: FlowStep) -> bool:
        """Whether the function came to ``other`` first."""
        if other.position and step.position:
            return other.position < step.position
        if other.position:
            return other.position <= self.came_to_at[number_of(step)]
        return number_of(other) < number_of(step) if not step.position else (
            step.position > self.came_to_at[number_of(other)]
        )  # fmt: skip


def number_of(keyed: FlowStep) -> int:
    """Which action took this step."""
    return int(keyed.args_json["key"].removeprefix("key "))


@pytest.fixture
def programs(bench: Bench) -> Programs:
    """A flow that does anything."""
    return Programs(bench)


@settings(
    max_examples=25, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(actions=PROGRAMS)
def test_a_fork_at_any_step_has_the_originals_prefix(bench: Bench, programs: Programs, actions: list[Any]) -> None:
    handle = programs.flow.start(actions)
    came_to = bench.finish(handle, 60)
    steps = bench.store.list_steps(handle.id)
    for step in steps:
        forked = handle.fork(from_step=step.run_id)
        taken = [each for each in bench.store.list_steps(forked.id) if each.task != FORK]
        wanted = [other for other in steps if other is not step and programs.is_before(other, step)]
        assert sorted(map(kept, taken)) == sorted(map(kept, wanted))
        assert {each.run_id for each in taken} == {renamed(handle, forked.id, each) for each in wanted}
        assert bench.finish(forked, 60) == came_to
        assert list(audit.verify(bench.store, [handle.id, forked.id])) == []
        assert len(bench.store.list_steps(forked.id)) == len(steps) + bool(taken)


def kept(step: FlowStep) -> str:
    """What a step that is taken over keeps."""
    return repr([getattr(step, name) for name in KEPT])


def renamed(handle: FlowHandle[Any], flow_id: UUID, step: FlowStep) -> str:
    """The run id that the flow gives to this step of the other."""
    if not step.position:
        return run_id_by(flow_id, step.task, step.args_json["key"])
    counts = range(1, step.position + 1)
    (count,) = [count for count in counts if run_id_of(handle.id, step.task, count) == step.run_id]
    return run_id_of(flow_id, step.task, count)
