"""From Python values to JSON and back, by the annotations of flow functions and steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError
from sqlalchemy.exc import StatementError

from celery_flows.store.errors import InvalidData
from celery_flows.store.script import first_line
from celery_flows.store.validation import encode_json
from celery_flows.tasks.partials import innermost
from celery_flows.tasks.refusals import refused

MAX_MESSAGE_CHARS = 1000


class Codec:
    """Encodes values of one annotation as JSON text and reads them back. ``Any`` takes JSON's own types as they are."""

    def __init__(self, annotation: Any) -> None:
        self._adapter: TypeAdapter[Any] | None = None if annotation is Any else TypeAdapter(annotation)

    def encode(self, field: str, value: Any, limit: int) -> str:
        """JSON text of the value.

        Raises:
            InvalidData: it is not of this type, or cannot be JSON. The message names the place, never the value.
        """
        if self._adapter is None:
            return encode_json(field, value, limit=limit)
        try:
            checked = self._adapter.validate_python(value)
            plain = self._adapter.dump_python(checked, mode="json", warnings="error")
        except ValidationError as error:
            raise refused(field, error, self._adapter) from None
        except (PydanticSerializationError, UnicodeError):  # the latter for bytes that are no text
            raise InvalidData(field, "cannot be JSON") from None
        return encode_json(field, plain, limit=limit)

    def decode(self, field: str, plain: Any) -> Any:
        """The value that JSON data stands for.

        Raises:
            InvalidData: the stored data no longer fits the annotation.
        """
        if self._adapter is None:
            return plain
        try:
            return self._adapter.validate_python(plain)
        except ValidationError as error:
            raise refused(field, error, self._adapter) from None


ANY = Codec(Any)
_cached = lru_cache(maxsize=4096)(Codec)


def codec_for(annotation: Any) -> Codec:
    """The codec of an annotation."""
    try:
        return _cached(annotation)
    except TypeError:  # an unhashable annotation
        return Codec(annotation)


def result_codec(function: Callable[..., Any]) -> Codec:
    """The codec of what a step returns; without a usable annotation, JSON's own types."""
    function = innermost(function)
    try:
        return codec_for(get_type_hints(function).get("return", Any))
    except Exception:  # an annotation that only type checkers can resolve, or that pydantic knows no schema for
        return ANY


def read_back(text: str) -> Any:
    """What a record of this JSON text will give when it is replayed."""
    return json.loads(text)


def describe(error: BaseException) -> dict[str, Any]:
    """What history keeps of an error: its type and message, cut to size and made storable. Of a failed statement
    neither text nor parameters: they are the application's data."""
    told = first_line(error) if isinstance(error, StatementError) else error
    return {"type": type(error).__name__, "message": as_text(told)}


def as_text(value: object) -> str:
    """The value as text, cut to size and made storable."""
    try:
        text = str(value)
    except Exception:  # an error that cannot be told must not keep a flow from failing
        text = ""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()[:MAX_MESSAGE_CHARS]
