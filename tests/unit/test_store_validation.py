"""What is refused before anything is written, and that what is not refused survives as JSON."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_flows.store import InvalidData
from celery_flows.store.validation import MAX_NAME_CHARS, check_name, check_text, encode_json
from tests.support.samples import UNSTORABLE

any_text = st.text(st.characters(exclude_categories=()), max_size=8)  # NUL and lone surrogates included
scalars = st.none() | st.booleans() | st.integers() | st.floats() | any_text
json_like: st.SearchStrategy[Any] = st.recursive(
    scalars | st.binary(max_size=3) | st.decimals(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(any_text | st.integers() | st.none(), inner, max_size=3)
        | st.frozensets(scalars, max_size=2)
    ),
    max_leaves=8,
)


def as_lists(value: Any) -> Any:
    """The value with tuples as lists, as JSON has it."""
    if isinstance(value, list | tuple):
        return [as_lists(item) for item in value]
    return {key: as_lists(item) for key, item in value.items()} if isinstance(value, dict) else value


def storable(value: Any) -> bool:
    """Whether PostgreSQL's jsonb takes the value as it is."""
    if isinstance(value, str):
        return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, float):
        return value - value == 0
    if isinstance(value, list | tuple):
        return all(map(storable, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and storable(key) and storable(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int)


@given(json_like)
def test_what_is_accepted_comes_back_and_what_is_not_storable_is_refused(value: Any) -> None:
    if storable(value):
        assert json.loads(encode_json("field", value)) == as_lists(value)
    else:
        with pytest.raises(InvalidData):
            encode_json("field", value)


@pytest.mark.parametrize("payload", UNSTORABLE.values(), ids=UNSTORABLE)
def test_a_refusal_names_the_place_and_the_rule_never_the_value(payload: dict[str, Any]) -> None:
    with pytest.raises(InvalidData) as caught:
        encode_json("payload", {"outer": {**payload, "secret": "hunter2"}})
    assert caught.value.field.startswith("payload")
    assert caught.value.rule
    assert "hunter2" not in str(caught.value)


def test_a_refusal_names_the_path() -> None:
    with pytest.raises(InvalidData) as caught:
        encode_json("payload", {"lines": [1, {"price": Decimal("1.5")}]})
    assert caught.value.field == "payload.lines[1].price"


def test_a_payload_is_measured_in_bytes() -> None:
    assert encode_json("p", "ü" * 4, limit=10) == '"üüüü"'
    with pytest.raises(InvalidData, match="12 bytes of JSON; 10 are allowed"):
        encode_json("p", "ü" * 5, limit=10)


def test_what_is_nested_without_end_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    deep: Any = 0
    for _ in range(100_000):
        deep = [deep]
    for value in (endless, deep):
        with pytest.raises(InvalidData):
            encode_json("p", value)
    while isinstance(deep, list):  # taking it apart by itself would overflow the stack
        deep = deep.pop() if deep else 0


@pytest.mark.parametrize("name", ["a", "orders/fulfil", "ü" * MAX_NAME_CHARS, " inner space "])
def test_names(name: str) -> None:
    assert check_name("name", name) == name


@pytest.mark.parametrize("name", ["", " ", "\n\t", "a" * (MAX_NAME_CHARS + 1), "a\0", "\udfff", None, 7, b"a"])
def test_what_is_no_name(name: Any) -> None:
    with pytest.raises(InvalidData) as caught:
        check_name("controller_id", name)
    assert caught.value.field == "controller_id"


def test_a_text_may_be_empty_but_not_endless() -> None:
    assert check_text("goal", "") == ""
    with pytest.raises(InvalidData, match="5 characters long; 4 are allowed"):
        check_text("goal", "abcde", limit=4)
