"""Transactional steps: what a function writes through its session commits with the step's record, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from celery_flows.store import FlowStepStatus, InvalidData
from celery_flows.store.changes import StepWrite
from celery_flows.store.script import is_conflict
from celery_flows.tasks.inline import Attempts, code_name, step_name
from celery_flows.tasks.loop import is_async
from celery_flows.tasks.options import StepOptions, options_of
from celery_flows.tasks.payloads import read_back, result_codec
from celery_flows.tasks.replay import Replay
from celery_flows.tasks.timeout import time_limit
from celery_flows.tasks.transaction import hold_back


class Raised(Exception):
    """Carries what a function raised past the store and the driver, which would take it for their own."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def run_transaction(
    replay: Replay, options: StepOptions, work: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Runs a function in a transaction that commits with its record, or reads back what it came to.

    Raises:
        StepFailed: it failed for good; nothing of it was written.
        InvalidData: it is async.
    """
    driver = replay.driver
    options = options.over(options_of(work)).over(driver.defaults)
    name = options.name or step_name(work)
    if is_async(work):
        raise InvalidData(f"step {name}", "is async; a transaction's function is not, and has a plain Session")
    place = replay.place(name, options.key)
    known = replay.find(place)
    codec = result_codec(work)
    if known is not None and known.status.is_terminal:
        return replay.outcome(known, codec)
    what = f"result of step {place.name}"
    attempts = Attempts(replay, place, options, known, code_name(work))
    follow: Callable[[], None]

    def write(connection: Connection, began: float) -> StepWrite:
        nonlocal follow
        # Its commits and rollbacks are of a savepoint: the transaction is the step's.
        session = Session(connection, join_transaction_mode="create_savepoint")
        follow = hold_back(session)
        try:
            with session, replay.inside(place.name, work), time_limit(options.seconds):
                with replay.interruptible().body():
                    value = work(session, *args, **kwargs)
                session.flush()
                result = codec.encode(what, value, driver.max_payload_bytes)
                session.commit()
        except Exception as error:
            if isinstance(error, SQLAlchemyError) and (is_conflict(error) or connection.invalidated):
                raise
            raise Raised(error) from error
        return attempts.written(FlowStepStatus.SUCCEEDED, began, result=result)

    def attempt(began: float) -> str:
        try:
            result = driver.transact(lambda connection: write(connection, began))
        except Raised as raised:
            raise raised.error from None
        follow()
        return result

    return codec.decode(what, read_back(attempts.until_done(attempt)))
