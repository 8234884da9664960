"""From Python to JSON and back: what goes in comes out, what cannot is refused before it is written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AfterValidator, BaseModel, Field
from pydantic_core import PydanticCustomError

from celery_flows import InvalidData
from celery_flows.store.models import FlowStep
from celery_flows.store.validation import MAX_PAYLOAD_BYTES
from celery_flows.tasks.payloads import ANY, MAX_MESSAGE_CHARS, codec_for, describe, read_back, result_codec
from tests.support.samples import UNSTORABLE

LIMIT = MAX_PAYLOAD_BYTES
SECRET = "hunter2"


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Box(BaseModel):
    label: str
    weight: Decimal
    packed_at: datetime
    colour: Colour = Colour.RED
    parts: tuple[int, ...] = ()
    spare: date | None = None


@dataclass(frozen=True)
class Load:
    id: UUID
    boxes: list[Box]
    by_name: dict[str, timedelta]


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(text, children, max_size=4),
    max_leaves=12,
)
boxes = st.builds(
    Box,
    label=text,
    weight=st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**6), max_value=10**6),
    packed_at=st.datetimes(timezones=st.just(UTC), min_value=datetime(1970, 1, 1), max_value=datetime(2100, 1, 1)),  # noqa: DTZ001
    colour=st.sampled_from(Colour),
    parts=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    spare=st.none() | st.dates(),
)
seconds = st.integers(0, 10**6).map(lambda n: timedelta(seconds=n))
loads = st.builds(
    Load, id=st.uuids(), boxes=st.lists(boxes, max_size=3), by_name=st.dictionaries(text, seconds, max_size=3)
)


def there_and_back(annotation: Any, value: Any) -> Any:
    codec = codec_for(annotation)
    return codec.decode("value", read_back(codec.encode("value", value, LIMIT)))


@given(plain)
def test_json_comes_back_as_it_was(value: Any) -> None:
    assert there_and_back(Any, value) == value


@given(boxes)
def test_models_come_back_equal(box: Box) -> None:
    assert there_and_back(Box, box) == box


@given(loads)
def test_dataclasses_come_back_equal(load: Load) -> None:
    assert there_and_back(Load, load) == load


@given(st.lists(boxes | st.integers() | text, max_size=4))
def test_unions_come_back_equal(values: list[Any]) -> None:
    assert there_and_back(list[Box | int | str], values) == values


@given(plain)
def test_what_is_written_once_is_written_alike_again(value: Any) -> None:
    """A key that comes back is compared by its stored input, so writing must not depend on how the value was made."""
    once = ANY.encode("value", value, LIMIT)
    assert ANY.encode("value", read_back(once), LIMIT) == once


@pytest.mark.parametrize("name", list(UNSTORABLE))
def test_what_cannot_be_stored_is_refused_without_annotation(name: str) -> None:
    with pytest.raises(InvalidData, match=r"^result"):
        ANY.encode("result", UNSTORABLE[name], LIMIT)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, "many"),
        (int, None),
        (Box, {"label": "a"}),
        (Box, None),
        (list[int], [1, "x"]),
        (float, float("nan")),
        (str, "a\0b"),
        (str, "\ud800"),
        (bytes, b"\xff\xfe"),
        (dict[str, int], {"a": SECRET}),
        (Load, {"id": SECRET}),
        (None, 1),
    ],
)
def test_what_does_not_fit_its_annotation_is_refused(annotation: Any, value: Any) -> None:
    with pytest.raises(InvalidData) as refused:
        codec_for(annotation).encode("result", value, LIMIT)
    assert str(refused.value).startswith("result")
    assert SECRET not in str(refused.value)


def test_refusals_name_the_place_and_never_the_value() -> None:
    with pytest.raises(InvalidData) as refused:
        codec_for(dict[str, Box]).encode("input", {"first": {"label": SECRET, "weight": SECRET}}, LIMIT)
    assert refused.value.field == "input.….weight"
    assert SECRET not in str(refused.value)
    with pytest.raises(InvalidData) as refused:
        codec_for(Box).decode("input", {"label": [SECRET]})
    assert SECRET not in str(refused.value)


class Card(BaseModel):
    kind: Literal["card"]
    number: Annotated[str, Field(max_length=3)]


class Iban(BaseModel):
    kind: Literal["iban"]


class Pay(BaseModel, extra="forbid"):
    by: Annotated[Card | Iban, Field(discriminator="kind")] | None = None
    parts: list[int] = []
    ids: dict[int, int] = {}


def raises(error: Exception) -> Any:
    def refuse(value: Any) -> Any:
        raise error

    return Annotated[Any, AfterValidator(refuse)]


def iterates_badly() -> Any:
    yield 1
    raise RuntimeError(SECRET)


@pytest.mark.parametrize(
    ("annotation", "value", "told"),
    [
        (Pay, {"by": {"kind": SECRET}}, "input.by: Input should have a 'kind' that is one of 'card', 'iban'"),
        (Pay, {"by": {"kind": "card", "number": SECRET}}, "input.by.card.number: String should have at most 3 char"),
        (Pay, {SECRET: 1}, "input.…: Extra inputs are not permitted"),
        (Pay, {"ids": {4111: "x"}}, "input.ids.…: Input should be a valid integer"),
        (dict[str, int], {SECRET: "x"}, "input.…: Input should be a valid integer, unable to parse"),
        (dict[int, int], {SECRET: 1}, "input.….[key]: Input should be a valid integer"),
        (list[int], [1, SECRET], "input.1: Input should be a valid integer"),
        (UUID, SECRET, "input: Input should be a valid UUID"),
        (raises(ValueError(SECRET)), 1, "input: Input is refused by a validator"),
        (raises(AssertionError(SECRET)), 1, "input: Input is refused by a validator"),
        (raises(PydanticCustomError("bad_card", f"no {SECRET}")), 1, "input: Input is refused by a validator"),
        (list[int], iterates_badly(), "input.1: Error iterating over object"),
    ],
)  # fmt: skip
def test_a_refusal_has_no_word_of_the_value(annotation: Any, value: Any, told: str) -> None:
    with pytest.raises(InvalidData) as refused:
        codec_for(annotation).encode("input", value, LIMIT)
    assert str(refused.value).startswith(told)
    assert SECRET not in str(refused.value)
    assert "4111" not in str(refused.value)


def test_the_limit_counts_bytes() -> None:
    codec_for(str).encode("result", "é" * 4, 10)
    with pytest.raises(InvalidData, match="is 12 bytes of JSON; 10 are allowed"):
        codec_for(str).encode("result", "é" * 5, 10)


def test_a_function_without_a_usable_annotation_gives_json() -> None:
    def no_annotation(): ...  # type: ignore[no-untyped-def]

    def unresolvable() -> NowhereToBeFound: ...  # type: ignore[name-defined]  # noqa: F821

    for function in (no_annotation, unresolvable, len, str):
        assert result_codec(function).decode("result", {"a": 1}) == {"a": 1}


def test_annotations_are_obeyed() -> None:
    def pack() -> list[Box]:
        return []

    box = Box(label="a", weight=Decimal("1.5"), packed_at=datetime(2030, 1, 1, tzinfo=UTC))
    codec = result_codec(pack)
    assert codec.decode("result", json.loads(codec.encode("result", [box], LIMIT))) == [box]


@given(st.text(max_size=3000))
def test_any_error_can_be_stored(message: str) -> None:
    told = describe(ValueError(message))
    assert told["type"] == "ValueError"
    assert len(told["message"]) <= MAX_MESSAGE_CHARS
    FlowStep(flow_id=UUID(int=1), run_id="r", task="t", error_json=told)  # the store takes it


def test_an_error_that_cannot_be_told_is_named_all_the_same() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    assert describe(Mute())["type"] == "Mute"
