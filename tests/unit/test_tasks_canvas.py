"""What a canvas says beforehand of the tasks it will run, as objects and as a message carries it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, chain, chord, group

from celery_flows.tasks.canvas import HEADER, mark, planned, planned_by_message


@pytest.fixture
def app() -> Iterator[Celery]:
    with Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False) as made:
        made.task(name="a", shared=False)(nothing)
        yield made


def nothing(*_: Any) -> None:
    pass


def frozen(canvas: Any) -> Any:
    canvas.freeze("last")
    return canvas


def first_and_rest(canvas: Any) -> str:
    """F for each task that is published with the canvas, r for each that is published later."""
    return "".join("F" if each.is_first else "r" for each in planned(canvas, is_first=True))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda a: a, "F"),
        (lambda a: chain(a, a, a), "Frr"),
        (lambda a: chain(a, group(a, a)), "Frr"),
        (lambda a: group(a, a, a), "FFF"),
        (lambda a: group(a, chain(a, a)), "FFr"),
        (lambda a: chord([a, a], a), "FFr"),
        (lambda a: chord([chain(a, a), a], chain(a, a)), "FrFrr"),
        (lambda a: chain(group(a, a), a, a), "FFrr"),
        (lambda a: chord([], a), "F"),
    ],
)
def test_which_tasks_are_published_at_once(app: Celery, make: Any, expected: str) -> None:
    canvas = frozen(make(app.tasks["a"].si()).clone())
    assert first_and_rest(canvas) == expected
    assert len({each.run_id for each in planned(canvas)}) == len(expected)


def test_a_message_carries_the_same(app: Celery) -> None:
    a: Any = app.tasks["a"].si()
    canvas = frozen(chord([chain(a, a), group(a, a)], chain(a, a)).clone())
    assert list(planned(json.loads(json.dumps(canvas)))) == list(planned(canvas))


def test_what_follows_a_message_is_its_chain_in_order_and_then_its_chord(app: Celery) -> None:
    a: Any = app.tasks["a"].si()
    steps = [frozen(a.clone().set(task_id=name)) for name in ("body", "third", "second")]
    body, *rest = steps
    follow = planned_by_message({"chain": rest, "chord": body, "callbacks": None, "errbacks": None})
    assert [(each.run_id, each.is_first) for each in follow] == [("second", False), ("third", False), ("body", False)]
    assert list(planned_by_message({})) == list(planned_by_message({"chain": None, "chord": None})) == []


def test_a_mark_keeps_the_headers_that_are_there(app: Celery) -> None:
    a: Any = app.tasks["a"].si()
    canvas: Any = frozen(chain(a.clone().set(headers={"tenant": "acme"}), a.clone()))
    mark(canvas, "f")
    options = [member["options"] for member in canvas.tasks]
    assert [each["headers"] for each in options] == [{"tenant": "acme", HEADER: "f"}, {HEADER: "f"}]
    assert [each["root_id"] for each in options] == ["f", "f"]
    assert a.options == {}
