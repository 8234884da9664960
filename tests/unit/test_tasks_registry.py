"""Definitions: what may be registered, under which names, and what an unknown name is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from celery import Celery

from celery_flows import FlowDefinition, Flows, InvalidData, Run, UnknownFlow

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


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (nothing, "must take the run and at most one input"),
        (two_inputs, "must take the run and at most one input"),
        (unresolvable, "has an annotation that cannot be resolved"),
    ],
)
def test_functions_that_no_flow_can_be_are_refused(flows: Flows, function: Callable[..., Any], rule: str) -> None:
    with pytest.raises(InvalidData, match=f"flow bad: {rule}"):
        flows.flow("bad")(function)
    assert list(flows.runtime.registry) == []


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
