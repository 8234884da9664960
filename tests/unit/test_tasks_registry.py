"""Definitions: what may be registered, under which names, and what an unknown name is told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery

from celery_flows import AsyncRun, FlowDefinition, Flows, InvalidData, Limit, Retry, Run, UnknownFlow, step

if TYPE_CHECKING:
    from decimal import Decimal


@pytest.fixture
def flows() -> Flows:
    return Flows(Celery("registry", set_as_current=False))


def no_input(run: Run) -> int:
    return 1


def one_input(run: Run, n: int) -> int:
    return n


def test_a_definition_stays_callable_through_its_function(flows: Flows) -> None:
    definition = flows.flow("orders/fulfil", queue="slow")(one_input)
    assert isinstance(definition, FlowDefinition)
    assert (definition.name, definition.queue, definition.function, definition.takes_input) == (
        "orders/fulfil", "slow", one_input, True,
    )  # fmt: skip
    assert flows.flow("plain")(no_input).takes_input is False
    assert [known.name for known in flows.runtime.registry] == ["orders/fulfil", "plain"]


def nothing() -> None: ...
def two_inputs(run: Run, a: int, b: int) -> None: ...
def unresolvable(run: Run, amount: Decimal) -> None: ...
def by_keyword(run: Run, *, order: str) -> None: ...
def of_many(run: Run, *orders: str) -> None: ...
def with_options(run: Run, **options: str) -> None: ...
def yields(run: Run) -> Iterator[int]:
    yield 1


async def yields_later(run: AsyncRun) -> AsyncIterator[int]:
    yield 1


def wrong_default(run: Run, n: int = "many") -> None: ...  # type: ignore[assignment]


a_task = Celery("tasks", set_as_current=False).task(name="a task")(nothing)


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (nothing, "must take the run and at most one input"),
        (two_inputs, "must take the run and at most one input"),
        (unresolvable, "has an annotation that cannot be resolved"),
        (by_keyword, "must take the run and at most one input, by position"),
        (of_many, "must take the run and at most one input, by position"),
        (with_options, "must take the run and at most one input, by position"),
        (yields, "yields, and is called"),
        (yields_later, "yields, and is called"),
        (a_task, "must be a function, not a Celery task"),
        (int, "must be a function, not a class"),
        (partial(one_input, n=1), "must be a function, not partial"),
        (None, "must be a function, not NoneType"),
    ],
)
def test_functions_that_no_flow_can_be_are_refused(flows: Flows, function: Callable[..., Any], rule: str) -> None:
    with pytest.raises(InvalidData, match=f"flow bad: {rule}"):
        flows.flow("bad")(function)
    assert list(flows.runtime.registry) == []


def test_a_default_that_does_not_fit_its_annotation_is_refused(flows: Flows) -> None:
    with pytest.raises(InvalidData, match="default of n in flow bad: does not fit its annotation"):
        flows.flow("bad")(wrong_default)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"queue": 5}, "queue of flow bad: must be a string, not int"),
        ({"queue": ""}, "queue of flow bad: must not be empty"),
        ({"retry": 5}, "retry of flow bad: must be a Retry"),
        ({"overlap": "skip"}, "overlap of flow bad: goes with schedule="),
        ({"catch_up": "all"}, "catch_up of flow bad: goes with schedule="),
    ],
)
def test_options_that_would_be_found_out_later_or_never_are_refused(
    flows: Flows, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidData, match=told):
        flows.flow("bad", **options)(no_input)
    assert list(flows.runtime.registry) == []


def test_a_flow_without_a_name_is_told_to_have_one(flows: Flows) -> None:
    """The function would become something that is no definition, and that nothing complains of until it is started."""
    with pytest.raises(InvalidData, match=r'flow name: is missing; write @flows\.flow\("a/name"\), not function'):
        flows.flow(no_input)  # type: ignore[arg-type]


def test_options_of_a_step_above_its_celery_task_are_refused(flows: Flows) -> None:
    """They would be of the task, and nobody looks for them there."""
    app: Any = flows.app
    for task in app.task(name="lazy")(one_input), app.task(name="made", lazy=False)(one_input):
        with pytest.raises(InvalidData, match=r"step: is for the function: write @step\(…\) below @app.task"):
            step(name="charge")(task)
    assert "lazy" not in app._tasks  # it was not made before it had to be


@pytest.mark.parametrize("what", [abs, int, 5])
def test_options_of_what_cannot_keep_them_are_refused(what: Any) -> None:
    with pytest.raises(InvalidData, match=r"^step: is for a function"):
        step(name="x")(what)


@pytest.mark.parametrize("app", [None, "shop", object()])
def test_flows_of_what_is_no_app_are_refused(app: Any) -> None:
    with pytest.raises(InvalidData, match="app: must be your Celery app, not "):
        Flows(app)


def test_limits_and_retries_that_nothing_could_keep_are_refused() -> None:
    with pytest.raises(InvalidData, match="limit every: must be a second or more"):
        Limit(5, every=timedelta(milliseconds=999))
    with pytest.raises(InvalidData, match=r"retry\.jitter: must be True or False"):
        Retry(jitter="x")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", " ", "x" * 300, "a\0b", None, 7])
def test_names_that_are_none_are_refused(flows: Flows, name: Any) -> None:
    with pytest.raises(InvalidData, match="flow name"):
        flows.flow(name)(no_input)


def test_a_name_is_taken_once(flows: Flows) -> None:
    flows.flow("taken")(no_input)
    with pytest.raises(InvalidData, match=r"'taken' is taken by .*no_input"):
        flows.flow("taken")(one_input)
    assert flows.runtime.registry.require("taken").function is no_input


def test_a_name_of_the_engines_own_is_refused(flows: Flows) -> None:
    with pytest.raises(InvalidData, match=r"'flows\.event' is taken by celery-flows itself"):
        flows.flow("flows.event")(no_input)


def test_the_same_function_again_replaces_itself(flows: Flows) -> None:
    """A module that is reloaded defines its flows anew."""
    flows.flow("reloaded")(no_input)
    again = flows.flow("reloaded")(no_input)
    assert flows.runtime.registry.get("reloaded") is again


def test_an_unknown_name_is_told_the_known_ones(flows: Flows) -> None:
    with pytest.raises(UnknownFlow, match="no flow definition 'x'; registered are: none"):
        flows.runtime.registry.require("x")
    flows.flow("b")(no_input)
    flows.flow("a")(one_input)
    with pytest.raises(UnknownFlow, match="registered are: a, b"):
        flows.runtime.registry.require("x")
    assert flows.runtime.registry.get("x") is None
