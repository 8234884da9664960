"""What is told of a value that pydantic refuses: the place and the rule, never a part of the value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic_core.core_schema import ErrorType

from celery_flows.store.errors import InvalidData

ELSEWHERE = "…"  # a part of the place that may be of the value: the key of a dictionary
KEY = "[key]"  # pydantic's word for the key itself

_OF_VALIDATORS = frozenset({"value_error", "assertion_error"})  # told in the application's own words
_OF_PYDANTIC = frozenset(get_args(ErrorType)) - _OF_VALIDATORS
_REPEATS_VALUES = frozenset({"error", "encoding_error"})  # in an error's context: what it ran into


def refused(field: str, error: ValidationError, adapter: TypeAdapter[Any]) -> InvalidData:
    """The refusal of a value of ``field``, by the first of its errors."""
    first: Any = error.errors(include_input=False, include_url=False)[0]
    words = _Words(adapter.core_schema)
    place = [str(part) if words.has(part) else ELSEWHERE for part in first["loc"]]
    return InvalidData(".".join([field, *place]), _rule(first["type"], first["msg"], first.get("ctx", {})))


def _rule(kind: str, message: str, context: dict[str, Any]) -> str:
    if kind == "union_tag_invalid":
        return f"Input should have a {context['discriminator']} that is one of {context['expected_tags']}"
    if kind not in _OF_PYDANTIC:
        return "Input is refused by a validator"
    return message if _REPEATS_VALUES.isdisjoint(context) else re.split("[,:]", message)[0]


class _Words:
    """The words of a schema: names of fields, aliases, tags and classes. They are of the code, not of a value."""

    def __init__(self, schema: Any) -> None:
        self._seen: set[int] = set()
        self._words = {KEY, *self._words_of(schema)}

    def has(self, part: str | int) -> bool:
        """Whether a part of a place is one of them; or a number, which is one of a list if there is no dictionary."""
        return "dict" not in self._words if isinstance(part, int) else part in self._words

    def _words_of(self, schema: Any) -> Iterator[str]:
        if isinstance(schema, str):
            yield schema
        elif isinstance(schema, type):
            yield schema.__name__
        elif isinstance(schema, dict | list | tuple) and id(schema) not in self._seen:
            self._seen.add(id(schema))
            for part in [*schema, *schema.values()] if isinstance(schema, dict) else schema:
                yield from self._words_of(part)
