"""Something elsewhere takes its time, and does not call back: it is asked again and again. After the polling samples of
Temporal. Twice: as attempts of one step, and as a loop that tells what it sees."""

from __future__ import annotations

from datetime import timedelta

import pytest
from celery import Celery

from celery_flows import FlowFailed, Flows, FlowTimedOut, Retry, Run, step
from celery_flows.testing import FlowApp, FlowClock, FlowCrash

app = Celery("polling")
app.conf.update(task_default_queue="polling")
flows = Flows(app)


class NotReady(Exception):
    pass


class Elsewhere:
    """A service that renders films: done when it has been asked so often."""

    def __init__(self) -> None:
        self.asked, self.needed, self.given_up = 0, 5, False

    def submit(self, film: str) -> str:
        return f"order of {film}"

    def look(self, order: str) -> str:
        self.asked += 1
        return "done" if self.asked >= self.needed else "rendering"


elsewhere = Elsewhere()


def submit(film: str) -> str:
    return elsewhere.submit(film)


def look(order: str) -> str:
    return elsewhere.look(order)


@step(retry=Retry(max_attempts=1000, initial=timedelta(minutes=1), factor=1, jitter=False, on=(NotReady,)))
def await_film(order: str) -> str:
    if elsewhere.look(order) != "done":
        raise NotReady
    return f"film of {order}"


def give_up(order: str) -> None:
    elsewhere.given_up = True


# ---- the flows ----


@flows.flow("polling by retries")
def poll_by_retries(run: Run, film: str) -> str:
    return run.step(await_film, run.step(submit, film))


@flows.flow("polling in a loop", timeout=timedelta(hours=2))
def poll_in_a_loop(run: Run, film: str) -> str:
    order, pause = run.step(submit, film), timedelta(minutes=1)
    run.on_failure(give_up, order)
    while (seen := run.step(look, order)) != "done":
        run.update(seen=seen)
        run.sleep(pause)
        pause = min(pause * 2, timedelta(minutes=30))
    return f"film of {order}"


# ---- their tests ----


@pytest.fixture(autouse=True)
def _fresh() -> None:
    elsewhere.__init__()  # type: ignore[misc]


def test_attempts_are_a_minute_apart_and_hold_no_worker(flow_app: FlowApp, flow_clock: FlowClock) -> None:
    handle = poll_by_retries.start("Alien")
    flow_clock.advance(minutes=3, seconds=30)
    assert elsewhere.asked == 4
    flow_clock.advance(minutes=1)
    assert handle.result(0) == "film of order of Alien"
    assert [step.attempt for step in flow_app.store.list_steps(handle.id)] == [1, 5]


def test_a_loop_asks_less_and_less_and_tells_what_it_sees(flow_app: FlowApp, flow_clock: FlowClock) -> None:
    handle = poll_in_a_loop.start("Alien")
    flow_clock.advance(minutes=14)
    assert (elsewhere.asked, handle.state()) == (4, {"seen": "rendering"})
    assert handle.result() == "film of order of Alien"


def test_a_crash_does_not_order_the_film_again(flow_app: FlowApp, flow_crash: FlowCrash) -> None:
    flow_crash.at("look", when="during")
    assert poll_in_a_loop.start("Alien").result() == "film of order of Alien"
    assert flow_app.ran.count("submit") == 1


def test_patience_has_an_end_and_the_film_is_given_up(flow_app: FlowApp) -> None:
    elsewhere.needed = 1000
    with pytest.raises(FlowFailed, match=FlowTimedOut.__name__):
        poll_in_a_loop.start("Alien").result()
    assert elsewhere.given_up
