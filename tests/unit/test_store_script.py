"""How an operation is tried again: judged without a database, by what the driver said."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from math import inf
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from celery_flows.store import RevisionMismatch, StoreError
from celery_flows.store.models import new_id
from celery_flows.store.script import TRIES, Call, Pause, attempts, translated


class DriverError(Exception):
    """What a driver raises."""

    def __init__(self, text: str, sqlstate: str | None = None) -> None:
        super().__init__(text)
        self.sqlstate = sqlstate


def said(text: str, sqlstate: str | None = None, kind: type[DBAPIError] = OperationalError) -> DBAPIError:
    return kind("UPDATE secret", {"password": "hunter2"}, DriverError(text, sqlstate))


DEADLOCK = said("deadlock detected", "40P01")
SERIALIZATION = said("could not serialize access", "40001")
BUSY = OperationalError("UPDATE secret", {}, sqlite3.OperationalError("database is locked"))
LOCKED = said("canceling statement due to lock timeout", "55P03")
LOST = said("terminating connection due to administrator command", "57P01")
TIMEOUT = said("canceling statement due to statement timeout", "57014")
WRITE, LOOK = Call(lambda: None), Call(lambda: None)


def play(answers: Iterable[Any], **more: Any) -> tuple[Any, list[Call]]:
    """Plays the script with these answers; gives what it returned and the calls it made."""
    script, calls, waiting, paused = attempts(WRITE, **more), [], iter(answers), 0.0
    step = next(script)
    try:
        while True:
            if isinstance(step, Pause):
                paused += step.seconds
                assert 0 <= step.seconds <= 1
                assert paused < 8, "it does not try for ever"
                step = script.send(None)
                continue
            calls.append(step)
            answer = next(waiting, AssertionError("it asked once more"))
            step = script.throw(answer) if isinstance(answer, Exception) else script.send(answer)
    except StopIteration as end:
        return end.value, calls


@pytest.mark.parametrize("conflict", [DEADLOCK, SERIALIZATION, BUSY, LOCKED], ids=["deadlock", "40001", "busy", "held"])
def test_a_conflict_is_tried_again_as_a_whole(conflict: DBAPIError) -> None:
    assert play([conflict] * TRIES + ["done"]) == ("done", [WRITE] * (TRIES + 1))
    with pytest.raises(StoreError) as caught:
        play([conflict] * (TRIES + 1))
    assert caught.value.__cause__ is conflict


def test_after_a_lost_reply_it_looks_before_it_tries_again() -> None:
    assert play([LOST, "found"], settled=LOOK) == ("found", [WRITE, LOOK])
    assert play([LOST, None, "done"], settled=LOOK) == ("done", [WRITE, LOOK, WRITE])
    assert play([LOST, LOST, None, "done"], settled=LOOK) == ("done", [WRITE, LOOK, LOOK, WRITE])
    assert play([DEADLOCK, "done"], settled=LOOK) == ("done", [WRITE, WRITE]), "a deadlock wrote nothing"


def test_a_refusal_after_a_lost_reply_may_be_by_ones_own_write() -> None:
    refused = RevisionMismatch(new_id(), 1, 2)
    assert play([LOST, None, refused, "found"], settled=LOOK) == ("found", [WRITE, LOOK, WRITE, LOOK])
    with pytest.raises(RevisionMismatch):
        play([LOST, None, refused, None], settled=LOOK)
    with pytest.raises(RevisionMismatch):
        play([refused], settled=LOOK)


def test_a_held_lock_may_be_left_to_others_at_once() -> None:
    with pytest.raises(StoreError):
        play([LOCKED], lock_tries=0)


def test_a_held_lock_may_be_waited_for_without_an_end_and_other_conflicts_have_theirs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    held = [LOCKED] * (2 * TRIES)
    assert play([*held, DEADLOCK, "done"], lock_tries=inf) == ("done", [WRITE] * (2 * TRIES + 2))
    assert [record.message for record in caplog.records] == [
        "an open transaction holds a lock for long; what needs it is tried again and again"
    ]
    with pytest.raises(StoreError):
        play([DEADLOCK] * (TRIES + 1), lock_tries=inf)


def test_a_lost_connection_is_given_up_when_patience_ends() -> None:
    with pytest.raises(StoreError, match="could not be reached"):
        play([LOST] * 1000)
    with pytest.raises(StoreError):
        play([LOST], patience=0.0)


def test_a_repeated_claim_is_told_that_it_is_one() -> None:
    _, calls = play([LOST, "done"], again={"repeat": True})
    assert [call.kwargs for call in calls] == [{}, {"repeat": True}]


@pytest.mark.parametrize("error", [TIMEOUT, said("no such table", "42P01"), said("bad row", "23505", IntegrityError)])
def test_anything_else_is_raised_at_once(error: DBAPIError) -> None:
    with pytest.raises(StoreError) as caught:
        play([error])
    assert caught.value.__cause__ is error


def test_a_translated_error_keeps_statement_and_parameters_out() -> None:
    for error in (DEADLOCK, LOST, said("duplicate key\nDETAIL: Key (password)=(hunter2)", "23505", IntegrityError)):
        text = str(translated(error))
        assert "hunter2" not in text
        assert "UPDATE" not in text
