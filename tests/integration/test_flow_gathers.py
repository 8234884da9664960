"""What a gather may wait for, and of what: collected failures, the first success, a window, plain functions."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from celery_flows import FlowCancelled, FlowFailed, FlowStatus, InvalidData, Run, StepFailed
from celery_flows.store import FlowStepStatus, dispatch
from celery_flows.store.changes import Completion
from tests.support.bench import Bench


def halving(bench: Bench) -> Any:
    """A task that halves even numbers, and fails for odd ones."""

    @bench.task("halve")
    def halve(number: int) -> int:
        bench.effects.append(number)
        if number % 2:
            raise ValueError(f"{number} is odd")
        return number // 2

    return halve


def statuses(bench: Bench, flow_id: Any) -> list[str]:
    """The statuses of the steps, by position."""
    return [str(step.status) for step in sorted(bench.store.list_steps(flow_id), key=lambda step: step.position)]


# ---- failures collected ---------------------------------------------------------------------------------------------


def test_failures_are_given_in_place_of_results(bench: Bench) -> None:
    halve = halving(bench)

    @bench.flows.flow("collects")
    def collects(run: Run) -> list[str]:
        outcomes = run.gather([halve.s(n) for n in (2, 3, 4, 5)], return_exceptions=True)
        return [str(outcome) for outcome in outcomes]

    handle = collects.start()
    assert bench.finish(handle) == [
        "1", "step halve failed with ValueError: 3 is odd", "2", "step halve failed with ValueError: 5 is odd",
    ]  # fmt: skip
    assert sorted(bench.effects) == [2, 3, 4, 5]


def test_a_gather_in_which_all_fail_ends_too(bench: Bench) -> None:
    halve = halving(bench)

    @bench.flows.flow("collects")
    def collects(run: Run) -> int:
        outcomes = run.gather([halve.s(n) for n in (1, 3)], return_exceptions=True)
        return sum(isinstance(outcome, StepFailed) for outcome in outcomes)

    assert bench.finish(collects.start()) == 2


# ---- plain functions ------------------------------------------------------------------------------------------------


def test_plain_functions_tasks_and_flows_are_gathered_together(bench: Bench) -> None:
    halve = halving(bench)

    @bench.flows.flow("child")
    def child(run: Run, name: str) -> str:
        return name.upper()

    @bench.flows.flow("mixed")
    def mixed(run: Run) -> list[Any]:
        return run.gather([partial(max, 1, 7), halve.s(8), child.s("x"), partial(min, 1, 7)])

    handle = mixed.start()
    assert bench.finish(handle) == [7, 4, "X", 1]
    steps = {step.position: step.task for step in bench.store.list_steps(handle.id)}
    assert sorted(steps.values()) == ["child", "halve", "max", "min"]


def test_a_plain_function_that_fails_keeps_the_tasks_from_being_scheduled(bench: Bench) -> None:
    halve = halving(bench)

    @bench.flows.flow("fails")
    def fails(run: Run) -> Any:
        return run.gather([halve.s(8), partial(int, "x")])

    with pytest.raises(FlowFailed, match="step int failed with ValueError"):
        bench.finish(fails.start())
    assert bench.effects == []


def test_failures_of_plain_functions_are_collected_too(bench: Bench) -> None:
    @bench.flows.flow("collects")
    def collects(run: Run) -> list[str]:
        return [str(each) for each in run.gather([partial(int, "x"), partial(int, "7")], return_exceptions=True)]

    first, second = bench.finish(collects.start())
    assert "ValueError" in first
    assert second == "7"


# ---- so many at a time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "limit"), [(10, 3), (5, 1), (4, 4), (4, 9), (23, 8)])
def test_no_more_are_out_than_may_be(bench: Bench, count: int, limit: int) -> None:
    halve = halving(bench)

    @bench.flows.flow("slides")
    def slides(run: Run) -> list[int]:
        return run.gather([halve.s(2 * n) for n in range(count)], limit=limit)

    handle = slides.start()
    most = 0
    for _ in range(20 * count):
        todo = bench.claimable()
        if not todo:
            break
        most = max(most, sum(kind == "step" for kind, _ in todo))
        kind, run_id = todo[0]
        bench.drive(handle.id) if kind == "drive" else bench.run_step(run_id)
    assert handle.result(0) == list(range(count))
    assert most <= limit
    assert sorted(bench.effects) == [2 * n for n in range(count)]


def test_a_window_slides_before_all_of_it_is_done(bench: Bench) -> None:
    halve = halving(bench)

    @bench.flows.flow("slides")
    def slides(run: Run) -> list[int]:
        return run.gather([halve.s(2 * n) for n in range(100)], limit=8)

    handle = slides.start()
    bench.drive(handle.id)
    for _ in range(2):  # a quarter of those that are out
        bench.run_step(next(run_id for kind, run_id in bench.claimable() if kind == "step"), goes_on=False)
    bench.drive(handle.id)
    assert sum(kind == "step" for kind, _ in bench.claimable()) == 8


def test_a_member_that_ends_while_the_window_is_moved_is_not_lost(bench: Bench) -> None:
    """It ends between the driver's look at history and its park: counted by nobody, it would leave the flow at rest."""
    halve = halving(bench)

    @bench.flows.flow("slides")
    def slides(run: Run) -> list[int]:
        ending = [run_id for kind, run_id in bench.claimable() if kind == "step"]
        if bench.effects:
            for run_id in ending:
                bench.run_step(run_id, goes_on=False)
        return run.gather([halve.s(2 * n) for n in range(12)], limit=4)

    handle = slides.start()
    assert bench.finish(handle) == list(range(12))


def test_a_failure_ends_the_sliding(bench: Bench) -> None:
    halve = halving(bench)

    @bench.flows.flow("slides")
    def slides(run: Run) -> list[int]:
        return run.gather([halve.s(n) for n in (2, 1, 4, 6, 8)], limit=2)

    handle = slides.start()
    with pytest.raises(FlowFailed, match="1 is odd"):
        bench.finish(handle)
    assert 8 not in bench.effects


def test_failures_are_collected_over_a_window(bench: Bench) -> None:
    halve = halving(bench)

    @bench.flows.flow("slides")
    def slides(run: Run) -> int:
        outcomes = run.gather([halve.s(n) for n in range(30)], limit=5, return_exceptions=True)
        return sum(isinstance(each, StepFailed) for each in outcomes)

    assert bench.finish(slides.start()) == 15


@pytest.mark.parametrize("limit", [0, -1, True])
def test_a_limit_that_makes_no_sense_is_refused(bench: Bench, limit: int) -> None:
    halve = halving(bench)

    @bench.flows.flow("refused")
    def refused(run: Run) -> Any:
        return run.gather([halve.s(2)], limit=limit)

    with pytest.raises(FlowFailed, match="gather limit: must be a whole number from 1"):
        bench.finish(refused.start())


# ---- the first ------------------------------------------------------------------------------------------------------


def test_the_first_success_is_the_result_and_the_others_are_cancelled(bench: Bench) -> None:
    halve = halving(bench)

    @bench.flows.flow("races")
    def races(run: Run) -> Any:
        return list(run.first([halve.s(n) for n in (1, 20, 30, 40)]))

    handle = races.start()
    bench.drive(handle.id)
    steps = {step.position: step.run_id for step in bench.store.list_steps(handle.id)}
    bench.run_step(steps[1], goes_on=False)  # fails
    assert [kind for kind, _ in bench.claimable()].count("drive") == 0
    bench.run_step(steps[3])
    assert handle.result(0) == [2, 15]
    assert bench.effects == [1, 30]
    assert statuses(bench, handle.id) == ["failed", "cancelled", "succeeded", "cancelled", "succeeded", "succeeded"]


def test_who_was_first_stays_first(bench: Bench) -> None:
    """A loser that runs on and succeeds later changes nothing, however the flow is replayed."""
    halve = halving(bench)

    @bench.flows.flow("races")
    def races(run: Run) -> list[Any]:
        first = run.first([halve.s(n) for n in (20, 30)]).value
        run.wait_for("go", "on")
        return [first, run.step(str, "end")]

    handle = races.start()
    bench.drive(handle.id)
    loser, winner = sorted(bench.store.list_steps(handle.id), key=lambda step: step.position)
    running = bench.store.run(dispatch.claim_step, loser.run_id, "node/1/loser", 30.0)
    assert running is not None
    bench.run_step(winner.run_id)
    assert handle.status() is FlowStatus.WAITING
    done = Completion(running.holder, handle.id, FlowStepStatus.SUCCEEDED, result="10")
    assert bench.store.run(dispatch.complete_step, done) is not None
    bench.flows.emit("go", "on")
    assert bench.finish(handle) == [15, "end"]


def test_when_all_fail_so_does_the_race(bench: Bench) -> None:
    halve = halving(bench)

    @bench.flows.flow("races")
    def races(run: Run) -> Any:
        return run.first([halve.s(n) for n in (1, 3, 5)])

    with pytest.raises(FlowFailed, match="5 is odd"):
        bench.finish(races.start())


def test_children_that_lose_are_cancelled(bench: Bench) -> None:
    @bench.flows.flow("child")
    def child(run: Run, name: str) -> str:
        try:
            return str(run.wait_for("go", name))
        except FlowCancelled:
            run.step(bench.effects.append, f"{name} cancelled")
            raise

    @bench.flows.flow("races")
    def races(run: Run) -> str:
        return run.first([child.s("a"), child.s("b")]).value

    handle = races.start()
    bench.work()
    bench.flows.emit("go", "b", "b went")
    assert bench.finish(handle) == "b went"
    bench.sweep()
    bench.work()
    assert bench.effects == ["a cancelled"]


@pytest.mark.parametrize("members", [[], [partial(int, "1")]])
def test_a_race_of_nothing_is_refused(bench: Bench, members: list[Any]) -> None:
    @bench.flows.flow("races")
    def races(run: Run) -> Any:
        return run.first(members)

    with pytest.raises(FlowFailed, match="first: takes one or more of"):
        bench.finish(races.start())


def test_a_gather_of_nothing_is_nothing(bench: Bench) -> None:
    @bench.flows.flow("empty")
    def empty(run: Run) -> list[Any]:
        return run.gather([])

    assert bench.finish(empty.start()) == []


@pytest.mark.parametrize("wrong", [7, "x", None])
def test_what_is_no_member_is_refused(bench: Bench, wrong: Any) -> None:
    @bench.flows.flow("wrong")
    def flow(run: Run) -> Any:
        return run.gather([wrong])

    with pytest.raises(FlowFailed, match=r"gather: takes task\.s"):
        bench.finish(flow.start())


def test_a_bare_task_is_refused_with_what_to_write(bench: Bench) -> None:
    halve = halving(bench)

    @bench.flows.flow("wrong")
    def flow(run: Run) -> Any:
        return run.gather([halve])

    with pytest.raises(FlowFailed, match="not a bare task"):
        bench.finish(flow.start())


@pytest.mark.parametrize(
    ("options", "members", "rule"),
    [
        ({"key": "k"}, 2, "step key: is of one step"),
        ({"name": "n"}, 1, "step name: is of plain functions"),
    ],
)
def test_options_that_fit_no_gather_are_refused(bench: Bench, options: Any, members: int, rule: str) -> None:
    halve = halving(bench)

    @bench.flows.flow("wrong")
    def flow(run: Run) -> Any:
        return run.options(**options).gather([halve.s(2)] * members)

    with pytest.raises(FlowFailed, match=rule):
        bench.finish(flow.start())


def test_a_key_is_the_steps_identity(bench: Bench) -> None:
    @bench.flows.flow("keyed")
    def keyed(run: Run, names: list[str]) -> list[str]:
        return [run.options(key=name).step(str.upper, name) for name in names]

    assert bench.finish(keyed.start(["a", "b"])) == ["A", "B"]
    with pytest.raises(FlowFailed, match="has a key that an earlier step of this name has"):
        bench.finish(keyed.start(["a", "a"]))


def test_a_collected_gather_raises_nothing_for_a_flow_that_is_cancelled(bench: Bench) -> None:
    halve = halving(bench)

    @bench.flows.flow("collects")
    def collects(run: Run) -> Any:
        return run.gather([halve.s(2), halve.s(4)], return_exceptions=True)

    handle = collects.start()
    bench.drive(handle.id)
    handle.cancel()
    bench.work()
    assert handle.status() is FlowStatus.CANCELLED


def test_invalid_arguments_of_one_schedule_none(bench: Bench) -> None:
    halve = halving(bench)

    @bench.flows.flow("wrong")
    def flow(run: Run) -> Any:
        with pytest.raises(InvalidData):
            run.gather([halve.s(2), halve.s(object())])
        return "none"

    assert bench.finish(flow.start()) == "none"
    assert bench.effects == []
