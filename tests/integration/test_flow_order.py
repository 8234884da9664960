"""What a flow is handed back when it is replayed is what it had when it was live, to the order of a dict's keys."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from celery_flows import Run
from celery_flows.store import operations as op
from celery_flows.store.tables import flow_events
from tests.support.bench import Bench

# PostgreSQL's jsonb sorts keys by length, takes 1e16 for a whole number and has no negative zero.
ODD: dict[str, Any] = {"zebra": 1, "ant": 1e16, "b": {"yy": -0.0, "x": 1e22}, "large": 10**30, "small": 5e-324}


def alike(one: Any, other: Any) -> bool:
    """Equal, of the same types, and in the same order."""
    return repr(one) == repr(other)


def test_a_flow_that_goes_through_a_dict_comes_to_the_same_steps_again(bench: Bench) -> None:
    shipped: list[str] = []

    def ship(what: str) -> str:
        shipped.append(what)
        return f"shipped {what}"

    @bench.flows.flow("ships")
    def ships(run: Run) -> dict[str, str]:
        told = {}
        for what in run.step(dict, zebra=1, ant=2, b=3):
            told[what] = run.step(ship, what)
            run.wait_for("go", what)
        return told

    handle = ships.start()
    for what in ("zebra", "ant", "b"):
        bench.work()
        bench.flows.emit("go", what)
    result = bench.finish(handle)
    assert shipped == ["zebra", "ant", "b"]
    assert list(result.items()) == [(what, f"shipped {what}") for what in shipped]


@pytest.mark.parametrize("way", ["step", "task", "transaction", "event", "child", "gather", "input", "state"])
def test_what_is_handed_back_is_what_was_written(bench: Bench, way: str) -> None:
    seen: list[Any] = []

    @bench.task("odd")
    def odd(given: Any) -> Any:
        seen.append(given)
        return given

    def here(given: Any) -> Any:
        return given

    @bench.flows.flow("child")
    def child(run: Run, given: Any) -> Any:
        return given

    @bench.flows.flow("hands back")
    def hands_back(run: Run, given: Any) -> Any:
        run.update(kept=ODD)
        ways: dict[str, Callable[[], Any]] = {
            "step": lambda: run.step(here, ODD),
            "task": lambda: run.step(bench.app.signature("odd", (ODD,))),
            "transaction": lambda: run.transaction(lambda session: ODD),
            "event": lambda: run.wait_for("odd", "one"),
            "child": lambda: run.flow(child, ODD),
            "gather": lambda: run.gather([lambda: ODD, bench.app.signature("odd", (ODD,))])[0],
            "input": lambda: given,
            "state": lambda: given,
        }
        got = ways[way]()
        seen.append(got)
        run.wait_for("go", "on")
        return got

    handle = hands_back.start(ODD)
    bench.flows.emit("odd", "one", ODD)
    bench.work()
    bench.flows.emit("go", "on")
    assert alike(bench.finish(handle), ODD)
    assert len(seen) >= 2
    assert [each for each in seen if not alike(each, ODD)] == []
    assert alike(handle.state()["kept"], ODD)
    assert math.copysign(1, handle.get().result_json["b"]["yy"]) == -1


def test_a_transaction_whose_reply_was_lost_gives_what_its_replay_will(bench: Bench) -> None:
    """It was read back from its event, which has another order."""

    @bench.flows.flow("loses a reply")
    def loses(run: Run) -> Any:
        return run.transaction(lambda session: ODD)

    handle = loses.start()
    bench.finish(handle)
    (step,) = bench.store.list_steps(handle.id)
    (write_id,) = bench.query(
        sa.select(flow_events.c.write_id).where(
            flow_events.c.flow_id == handle.id, flow_events.c.kind == "step_succeeded"
        )
    )[0]
    result = bench.store.run(op.find_step_result, handle.id, write_id)
    assert result is not None
    assert alike(json.loads(result), step.result_json)
    assert alike(step.result_json, ODD)
