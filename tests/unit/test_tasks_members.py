"""Celery signatures as steps: what a step cannot keep is refused, the rest goes where the task would go."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from celery import Celery, chain, chord, group

from celery_flows import InvalidData
from celery_flows.tasks.members import codec_of, member_of, task_name
from celery_flows.tasks.options import StepOptions
from celery_flows.tasks.replay import Place

LIMIT = 1000
SECRET = "hunter2"


@pytest.fixture
def app() -> Celery:
    made = Celery("members", broker="memory://", set_as_current=False)
    made.conf.task_routes = {"routed": {"queue": "by route"}}
    limits: dict[str, dict[str, Any]] = {
        "plain": {},
        "routed": {},
        "limited": {"time_limit": 60, "soft_time_limit": 50},
    }
    for name, options in limits.items():
        decorator: Any = made.task(name=name, shared=False, **options)
        decorator(count)
    return made


def count(*args: int, **kwargs: int) -> int:
    return len(args)


def member(app: Celery, signature: Any, **more: Any) -> Any:
    options = more.pop("options", StepOptions())
    return member_of(app, Place("run-1", signature.task, 3), signature, options, LIMIT, **more)


def test_a_member_is_what_the_signature_says(app: Celery) -> None:
    made = member(app, app.tasks["plain"].s(1, 2, scale=3))
    assert (made.run_id, made.position, made.task) == ("run-1", 3, "plain")
    assert json.loads(made.args) == {"args": [1, 2], "kwargs": {"scale": 3}}
    assert (made.queue, made.priority, made.options) == ("celery", None, None)


def test_cleanup_says_so(app: Celery) -> None:
    assert json.loads(member(app, app.tasks["plain"].s(), cleanup=True).args)["cleanup"] is True


def test_immutable_signatures_are_signatures(app: Celery) -> None:
    assert json.loads(member(app, app.tasks["plain"].si(1)).args)["args"] == [1]


@pytest.mark.parametrize(
    ("name", "set_options", "queue"),
    [("plain", {}, "celery"), ("routed", {}, "by route"), ("routed", {"queue": "by hand"}, "by hand")],
)
def test_the_queue_is_the_signatures_else_routed_else_the_default(
    app: Celery, name: str, set_options: dict[str, Any], queue: str
) -> None:
    assert member(app, app.tasks[name].s().set(**set_options)).queue == queue


def test_limits_and_priority_are_the_signatures_else_the_tasks(app: Celery) -> None:
    signature: Any = app.tasks["limited"].s()
    made = member(app, signature.set(time_limit=5, priority=9))
    assert (made.options, made.priority) == ({"time_limit": 5, "soft_time_limit": 50}, 9)


def test_a_task_that_is_not_here_may_still_be_a_step(app: Celery) -> None:
    made = member(app, app.signature("elsewhere", args=(1,)))
    assert (made.task, made.queue) == ("elsewhere", "celery")
    assert codec_of(app, app.signature("elsewhere")).decode("result", {"any": "thing"}) == {"any": "thing"}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("countdown", 5),
        ("eta", datetime(2030, 1, 1, tzinfo=UTC)),
        ("expires", 60),
        ("link", ["a signature"]),
        ("link_error", ["a signature"]),
        ("chord", "a chord"),
    ],
)
def test_options_that_a_step_cannot_keep_are_refused(app: Celery, option: str, value: Any) -> None:
    with pytest.raises(InvalidData, match=f"step plain: has {option}=, which a step cannot keep"):
        member(app, app.tasks["plain"].s().set(**{option: value}))


def test_canvas_and_what_is_no_signature_are_refused(app: Celery) -> None:
    plain = app.tasks["plain"]
    for canvas, said in [
        (group([plain.s()]), "group"),
        (chain(plain.s(), plain.s()), "chain"),
        (chord([plain.s()], plain.s()), "chord"),
    ]:
        with pytest.raises(InvalidData, match=f"a Celery {said} is no step"):
            task_name(canvas)
    for other in (plain, None, "plain", {"task": "plain"}):
        with pytest.raises(InvalidData, match=r"takes task\.s"):
            task_name(other)


@pytest.mark.parametrize("bad", [{SECRET}, b"raw", float("nan"), f"{SECRET}\0", object()])
def test_arguments_that_cannot_be_json_are_refused_without_repeating_them(app: Celery, bad: Any) -> None:
    with pytest.raises(InvalidData, match="arguments of step plain") as refused:
        member(app, app.tasks["plain"].s(1, password=bad))
    assert SECRET not in str(refused.value)


def test_arguments_over_the_limit_are_refused(app: Celery) -> None:
    with pytest.raises(InvalidData, match=r"is \d+ bytes of JSON; 1000 are allowed"):
        member(app, app.tasks["plain"].s("x" * 1000))


@pytest.mark.parametrize("priority", [-1, 256, "5", 1.5, float("nan")])
def test_a_priority_that_no_broker_takes_is_refused(app: Celery, priority: Any) -> None:
    with pytest.raises(InvalidData, match="step plain: has a priority that is no number from 0 to 255"):
        member(app, app.tasks["plain"].s().set(priority=priority))


@pytest.mark.parametrize("priority", [None, 0, 255])
def test_a_priority_that_brokers_take_is_kept(app: Celery, priority: Any) -> None:
    assert member(app, app.tasks["plain"].s().set(priority=priority)).priority == priority


@pytest.mark.parametrize("queue", ["x" * 201, "a\0b", "\ud800", "  "], ids=["long", "NUL", "surrogate", "blank"])
def test_a_queue_that_no_broker_takes_is_refused(app: Celery, queue: str) -> None:
    with pytest.raises(InvalidData, match="queue of step plain"):
        member(app, app.tasks["plain"].s().set(queue=queue))
