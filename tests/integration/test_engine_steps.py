"""Steps in the flow's own process: recorded once, read back when the flow function runs again from the top."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from celery_flows import FlowFailed, FlowStatus, InvalidData, Run, StepFailed
from celery_flows.tasks.replay import run_id_of
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench

MOMENT = timedelta(milliseconds=5)


class Order(BaseModel):
    id: str
    cents: int
    placed_at: datetime = datetime(2030, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Receipt:
    order: Order
    total: int


def reserve(order: Order) -> Receipt:
    return Receipt(order, order.cents)


def refuse() -> int:
    raise ValueError("sold out")


def test_a_recorded_step_is_read_back_and_not_run_again(bench: Bench) -> None:
    passes = []

    def count(name: str) -> int:
        bench.effects.append(name)
        return len(bench.effects)

    @bench.flows.flow("counts")
    def counts(run: Run) -> list[int]:
        passes.append(1)
        first = run.step(count, "a")
        run.sleep(MOMENT)
        second = run.step(count, "b")
        run.sleep(MOMENT)
        return [first, second, run.step(count, "c")]

    assert bench.finish(counts.start()) == [1, 2, 3]
    assert bench.effects == ["a", "b", "c"]
    assert len(passes) == 3


def test_a_step_has_committed_when_it_returns(bench: Bench) -> None:
    @bench.flows.flow("commits")
    def commits(run: Run) -> None:
        run.step(str, 1)
        stored = bench.store.list_steps(run.flow_id)
        bench.effects.append([(step.task, step.status, step.result_json) for step in stored])

    bench.finish(commits.start())
    assert bench.effects == [[("str", "succeeded", "1")]]


def test_results_come_back_as_what_they_were_live_and_replayed_alike(bench: Bench) -> None:
    @bench.flows.flow("typed")
    def typed(run: Run, order: Order) -> Receipt:
        receipt = run.step(reserve, order)
        bench.effects.append(receipt)
        run.sleep(MOMENT)
        return receipt

    order = Order(id="o-1", cents=5)
    assert bench.finish(typed.start(order)) == Receipt(order, 5)
    assert bench.effects == [Receipt(order, 5)] * 2


def test_a_failed_step_raises_alike_live_and_replayed(bench: Bench) -> None:
    @bench.flows.flow("catches")
    def catches(run: Run) -> str:
        try:
            run.step(refuse)
        except StepFailed as failed:
            bench.effects.append((failed.step, failed.type, failed.message))
        run.sleep(MOMENT)
        return "went on"

    assert bench.finish(catches.start()) == "went on"
    assert bench.effects == [("refuse", "ValueError", "sold out")] * 2


def test_an_uncaught_failure_fails_the_flow_and_says_why(bench: Bench) -> None:
    @bench.flows.flow("fails")
    def fails(run: Run) -> int:
        return run.step(refuse)

    handle = fails.start()
    with pytest.raises(FlowFailed, match="sold out") as failed:
        bench.finish(handle)
    assert (failed.value.flow_id, failed.value.reason) == (handle.id, "StepFailed")
    assert handle.get().state_json["failure"]["reason"] == "StepFailed"
    assert bench.kinds(handle.id) == ["created", "started", "step_failed", "failed"]


def test_steps_of_one_name_are_told_apart_by_their_count(bench: Bench) -> None:
    @bench.flows.flow("repeats")
    def repeats(run: Run) -> list[str]:
        return [run.step(str, 1), run.step(repr, 2), run.step(str, 3)]

    handle = repeats.start()
    assert bench.finish(handle) == ["1", "2", "3"]
    steps = {step.position: (step.task, step.run_id) for step in bench.store.list_steps(handle.id)}
    expected = [("str", 1), ("repr", 1), ("str", 2)]
    assert steps == {n: (name, run_id_of(handle.id, name, count)) for n, (name, count) in enumerate(expected, 1)}


@pytest.mark.parametrize(
    ("returned", "rule"),
    [(lambda: {1, 2}, "set"), (lambda: b"raw", "bytes"), (lambda: float("nan"), "NaN"), (lambda: "a\0b", "NUL")],
    ids=["set", "bytes", "NaN", "NUL"],
)
def test_a_result_that_cannot_be_json_fails_the_step_by_name(
    bench: Bench, returned: Callable[[], Any], rule: str
) -> None:
    def strange() -> Any:
        return returned()

    @bench.flows.flow("strange")
    def flow(run: Run) -> str:
        try:
            run.step(strange)
        except StepFailed as failed:
            return f"{failed.type}: {failed.message}"
        return "recorded"

    said = bench.finish(flow.start())
    assert said.startswith("InvalidData: result of step strange")
    assert rule in said


def test_a_result_that_is_not_of_the_annotated_type_fails_the_step(bench: Bench) -> None:
    def wrong() -> int:
        return "many"  # type: ignore[return-value]

    @bench.flows.flow("wrong")
    def flow(run: Run) -> int:
        return run.step(wrong)

    with pytest.raises(FlowFailed, match="result of step wrong: Input should be a valid integer"):
        bench.finish(flow.start())


def test_a_flow_result_that_cannot_be_json_fails_the_flow(bench: Bench) -> None:
    @bench.flows.flow("strange")
    def flow(run: Run) -> Any:
        return {"secret": object()}

    handle = flow.start()
    with pytest.raises(FlowFailed, match=r"result\.secret: is object, which is not a JSON type"):
        bench.finish(handle)


def test_a_result_over_the_limit_is_refused(make_bench: MakeBench) -> None:
    bench = make_bench(max_payload_bytes=100)

    @bench.flows.flow("large")
    def flow(run: Run) -> str:
        return run.step(str.ljust, "a", 200)

    with pytest.raises(FlowFailed, match="100 are allowed"):
        bench.finish(flow.start())


@pytest.mark.parametrize("wrong", [{"id": "o-1"}, {"id": "o-1", "cents": "many"}, None, "o-1"])
def test_wrong_input_is_refused_before_anything_is_written(bench: Bench, wrong: Any) -> None:
    @bench.flows.flow("orders")
    def flow(run: Run, order: Order) -> None: ...

    with pytest.raises(InvalidData, match="input"):
        flow.start(wrong)
    assert bench.store.list_by_status(FlowStatus.CREATED) == []
    assert bench.messages() == []


def test_input_for_a_flow_that_takes_none_is_refused(bench: Bench) -> None:
    @bench.flows.flow("takes none")
    def flow(run: Run) -> None: ...

    with pytest.raises(InvalidData, match="takes none"):
        flow.start({"a": 1})  # type: ignore[arg-type]
    assert bench.store.list_by_status(FlowStatus.CREATED) == []


def test_stored_input_that_no_longer_fits_fails_the_flow(bench: Bench) -> None:
    @bench.flows.flow("old")
    def old(run: Run, order: dict[str, Any]) -> None: ...

    handle = old.start({"unknown": 1})

    def new(run: Run, order: Order) -> None: ...

    bench.runtime.registry._definitions.clear()  # a new version of the code is deployed
    bench.flows.flow("old")(new)
    with pytest.raises(FlowFailed, match=r"input\.id: Field required"):
        bench.finish(handle)


def test_steps_inside_steps_are_refused(bench: Bench) -> None:
    @bench.flows.flow("nests")
    def nests(run: Run) -> str:
        def outer() -> str:
            return run.step(str, 1)

        try:
            return run.step(outer)
        except StepFailed as failed:
            return failed.message

    assert "was taken inside step outer; steps do not nest" in bench.finish(nests.start())


def test_steps_in_finally_do_not_run_while_the_flow_waits(bench: Bench) -> None:
    """The flow function is unwound when it waits. Its ``finally`` runs then, but must not act as if it had ended."""

    def clean(label: str) -> None:
        bench.effects.append(label)

    @bench.flows.flow("cleans")
    def cleans(run: Run) -> None:
        try:
            run.sleep(MOMENT)
            run.step(clean, "in between")
            run.sleep(MOMENT)
        finally:
            run.step(clean, "at the end")

    handle = cleans.start()
    bench.finish(handle)
    assert bench.effects == ["in between", "at the end"]


def test_catching_every_exception_does_not_keep_a_flow_from_waiting(bench: Bench) -> None:
    @bench.flows.flow("greedy")
    def greedy(run: Run) -> str:
        for _ in range(3):
            try:
                run.sleep(MOMENT)
            except Exception as error:
                return f"caught {error!r}"
        return "slept"

    assert bench.finish(greedy.start()) == "slept"


def test_catching_even_base_exceptions_ends_nothing(bench: Bench) -> None:
    """Even ``except BaseException`` around a wait cannot record an end that did not happen."""

    @bench.flows.flow("greediest")
    def greediest(run: Run) -> str:
        try:
            run.sleep(timedelta(milliseconds=100))
        except BaseException:
            return "caught"
        return "slept"

    handle = greediest.start()
    bench.work()
    assert handle.status() is FlowStatus.WAITING
    assert bench.finish(handle) == "slept"


def test_an_error_that_cannot_be_told_still_fails_the_flow(bench: Bench) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    @bench.flows.flow("mute")
    def mute(run: Run) -> None:
        raise Mute

    with pytest.raises(FlowFailed) as failed:
        bench.finish(mute.start())
    assert failed.value.type == "Mute"


def test_only_what_the_flow_does_moves_the_history(bench: Bench) -> None:
    @bench.flows.flow("story")
    def story(run: Run) -> int:
        run.step(str, 1)
        run.sleep(MOMENT)
        return 3

    handle = story.start(goal="to be told", owner="tenant:acme")
    bench.finish(handle)
    assert bench.kinds(handle.id) == [
        "created",
        "started",
        "step_succeeded",
        "waiting",
        "resumed",
        "step_succeeded",
        "finished",
    ]
    flow = handle.get()
    assert (flow.goal, flow.owner_session_key, flow.current_step) == ("to be told", "tenant:acme", "sleep")
