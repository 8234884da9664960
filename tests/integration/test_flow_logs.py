"""Whatever is logged while a flow is at work says which flow and step that was."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import structlog
from celery import Celery
from celery.utils.log import get_task_logger

from celery_flows import AsyncRun, FlowFailed, Retry, Run
from celery_flows.logs import FlowContext, add_flow_context, use_flow_logging
from celery_flows.tasks.bound import NAMES, at_work
from tests.support.bench import Bench

own = logging.getLogger("shop.orders")
of_task = get_task_logger("shop.tasks")


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """What is logged, through a handler that has the filter."""
    kept: list[logging.LogRecord] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(record)

    handler = Keeping()
    handler.addFilter(FlowContext())
    loggers = [logging.getLogger(), logging.getLogger("celery.task")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield kept
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def bound(records: list[logging.LogRecord], message: str) -> dict[str, Any]:
    """What the first record with this message says of where it was logged."""
    record = next(record for record in records if record.getMessage() == message)
    return {name: getattr(record, name) for name in NAMES}


def test_ones_own_loggers_and_celerys_tell_of_flow_and_step(bench: Bench, records: list[logging.LogRecord]) -> None:
    @bench.task("charge")
    def charge() -> None:
        of_task.info("charging")

    def reserve() -> None:
        own.info("reserving")

    @bench.flows.flow("order")
    def order(run: Run) -> None:
        own.info("beginning")
        run.logger.info("by the run's logger")
        run.step(reserve)
        run.step(charge)
        own.info("ending")

    own.info("outside")
    handle = order.start()
    bench.finish(handle)

    nothing = dict.fromkeys(NAMES, "")
    of_flow = {**nothing, "flow": "order", "flow_id": str(handle.id)}
    run_ids = {step.task: step.run_id for step in bench.store.list_steps(handle.id)}
    assert bound(records, "outside") == nothing
    for message in ("beginning", "by the run's logger", "ending"):
        assert bound(records, message) == of_flow
    in_step = {"step": "reserve", "run_id": run_ids["reserve"], "attempt": 1}
    assert bound(records, "reserving") == {**of_flow, **in_step}
    in_step = {"step": "charge", "run_id": run_ids["charge"], "attempt": 1}
    assert bound(records, "charging") == {**of_flow, **in_step}
    assert at_work() == {}


def test_the_engines_own_lines_tell_of_what_they_are_about(bench: Bench, records: list[logging.LogRecord]) -> None:
    def stumble() -> None:
        bench.effects.append("tried")
        own.info("try %d", len(bench.effects))
        if len(bench.effects) == 1:
            raise LookupError

    @bench.task("refuse")
    def refuse() -> None:
        raise LookupError

    @bench.flows.flow("fails")
    def fails(run: Run) -> None:
        run.options(retry=Retry(2, initial=timedelta(milliseconds=1))).step(stumble)
        run.step(refuse)

    handle = fails.start()
    with pytest.raises(FlowFailed):
        bench.finish(handle)
    assert bound(records, "try 2")["attempt"] == 2
    refused = f"step refuse of flow {handle.id} failed for good: LookupError"
    assert (bound(records, refused)["step"], bound(records, refused)["flow"]) == ("refuse", "fails")
    failed = f"flow {handle.id} of 'fails' failed: StepFailed"
    assert (bound(records, failed)["flow_id"], bound(records, failed)["step"]) == (str(handle.id), "")


def test_steps_side_by_side_are_not_mixed_up(bench: Bench, records: list[logging.LogRecord]) -> None:
    import asyncio

    async def fetch(number: int) -> None:
        own.info("begin %d", number)
        await asyncio.sleep(0.01 * (3 - number))
        own.info("end %d", number)

    @bench.flows.flow("async")
    async def together(run: AsyncRun) -> None:
        own.info("before")
        await run.gather([partial(fetch, number) for number in range(3)])
        own.info("after")

    handle = together.start()
    bench.finish(handle)
    run_ids = [step.run_id for step in bench.store.list_steps(handle.id)]
    assert {bound(records, f"begin {number}")["run_id"] for number in range(3)} == set(run_ids)
    for number in range(3):
        assert bound(records, f"begin {number}") == bound(records, f"end {number}")
    assert bound(records, "before") == bound(records, "after")
    assert bound(records, "after")["step"] == ""
    assert at_work() == {}


def test_structlog_has_a_processor(bench: Bench) -> None:
    told: list[Any] = []

    def keep(logger: Any, method: str, event: Any) -> Any:
        told.append(dict(event))
        raise structlog.DropEvent

    log = structlog.wrap_logger(None, processors=[add_flow_context, keep])

    @bench.flows.flow("says")
    def says(run: Run) -> None:
        log.info("hello", boxes=3)

    log.info("outside")
    handle = says.start()
    bench.finish(handle)
    assert told == [
        {"event": "outside"},
        {"event": "hello", "boxes": 3, "flow": "says", "flow_id": str(handle.id)},
    ]


@pytest.fixture
def celery_app() -> Iterator[Celery]:
    app = Celery("logs", set_as_current=False)
    yield app
    app.close()


@pytest.mark.parametrize("format", ["json", "console"])
def test_an_app_that_asks_for_it_writes_all_its_lines_so(celery_app: Celery, format: str) -> None:
    use_flow_logging(celery_app)
    celery_app.conf.flow_log_format = format
    stream, logger = io.StringIO(), logging.Logger("shop")
    celery_app.log.setup_handlers(logger, stream, "%(message)s", False)
    from celery_flows.tasks.bound import binding

    with binding(flow="order", flow_id="flow-1", step="charge", run_id="run-1", attempt=2):
        logger.warning("took %d s", 7, extra={"data": {"args": "hunter2"}})
    try:
        raise LookupError("where")
    except LookupError:
        logger.exception("lost")
    text = stream.getvalue()
    assert "hunter2" not in text  # as Celery gives its lines the arguments of tasks
    assert "LookupError" in text
    if format == "console":
        assert "took 7 s" in text
        assert "flow_id=flow-1" in text
        return
    first, second = map(json.loads, text.splitlines())
    assert first.items() >= {
        "event": "took 7 s", "level": "warning", "logger": "shop", "flow": "order", "flow_id": "flow-1",
        "step": "charge", "run_id": "run-1", "attempt": 2,
    }.items()  # fmt: skip
    assert first["timestamp"].endswith("Z")
    assert "flow_id" not in second


def test_nobody_elses_logging_is_touched() -> None:
    from celery_flows.worker.app import app

    assert Celery("mine", set_as_current=False).log_cls == Celery.log_cls
    assert app.log_cls != Celery.log_cls
