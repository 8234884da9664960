"""Money is moved once, or comes back once, whoever dies meanwhile."""

from __future__ import annotations

import pytest

from celery_flows import FlowFailed
from celery_flows.testing import FlowApp, FlowCrash, When, assert_history
from tests.scenarios.money_transfer import Transfer, transfer
from tests.scenarios.outside import Outside

ORDER = Transfer(reference="r1", source="ann", target="bob", cents=500)
OUT, IN, BACK = "withdraw 500 from ann", "deposit 500 to bob", "refund 500 to ann"


def test_money_moves(flow_app: FlowApp, world: Outside) -> None:
    handle = transfer.start(ORDER)
    assert handle.result() == [OUT, IN]
    assert world.asked == [OUT, IN]
    assert_history(
        handle, ["created", "started", "step_succeeded withdraw", ..., "step_succeeded deposit", ..., "finished"]
    )


def test_a_bank_that_is_down_for_a_while_is_asked_again(flow_app: FlowApp, world: Outside) -> None:
    world.refuse("deposit", times=2)
    assert transfer.start(ORDER).result() == [OUT, IN]
    assert world.asked == [OUT, IN, IN, IN]
    assert world.done == [OUT, IN]


def test_what_cannot_be_deposited_comes_back(flow_app: FlowApp, world: Outside) -> None:
    world.refuse("deposit")
    with pytest.raises(FlowFailed) as failed:
        transfer.start(ORDER).result()
    assert failed.value.cause is not None
    assert (failed.value.cause.step, failed.value.cause.type) == ("deposit", "Refused")
    assert failed.value.undo_failed == ()
    assert world.done == [OUT, BACK]


def test_what_cannot_be_withdrawn_is_not_given_back(flow_app: FlowApp, world: Outside) -> None:
    world.refuse("withdraw")
    with pytest.raises(FlowFailed):
        transfer.start(ORDER).result()
    assert world.done == []


@pytest.mark.parametrize(("when", "times"), [("before", 1), ("during", 2), ("after", 1)])
@pytest.mark.parametrize("step", ["withdraw", "deposit", "refund"])
def test_a_crash_moves_nothing_twice(
    flow_app: FlowApp, flow_crash: FlowCrash, world: Outside, step: str, when: When, times: int
) -> None:
    flow_crash.at(step, when=when)
    handle = transfer.start(ORDER)
    if step == "refund":
        world.refuse("deposit")
        with pytest.raises(FlowFailed):
            handle.result()
        assert world.done == [OUT, BACK]
    else:
        assert handle.result() == [OUT, IN]
        assert world.done == [OUT, IN]
    assert flow_app.ran.count(step) == times
    assert flow_app.ran.count("withdraw") == (times if step == "withdraw" else 1)
