"""What the store refuses before anything is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from celery_flows.store.errors import InvalidData

MAX_PAYLOAD_BYTES = 1024 * 1024
MAX_NAME_CHARS = 200
MAX_TEXT_CHARS = 4000


def check_name(field: str, value: Any, *, limit: int = MAX_NAME_CHARS) -> str:
    """``value``, if it is a name: not empty, not over ``limit`` characters, storable as text.

    Raises:
        InvalidData: naming the field and the rule.
    """
    check_text(field, value, limit=limit)
    if not value.strip():
        raise InvalidData(field, "must not be empty")
    return str(value)


def check_text(field: str, value: Any, *, limit: int = MAX_TEXT_CHARS) -> str:
    """``value``, if PostgreSQL can store it as text of at most ``limit`` characters.

    Raises:
        InvalidData: naming the field and the rule.
    """
    if not isinstance(value, str):
        raise InvalidData(field, f"must be a string, not {type(value).__name__}")
    if len(value) > limit:
        raise InvalidData(field, f"is {len(value)} characters long; {limit} are allowed")
    if _unstorable(value):
        raise InvalidData(field, "contains a NUL character or a lone surrogate, which PostgreSQL cannot store")
    return value


def check_list(field: str, values: Iterable[Any]) -> list[Any]:
    """The values, if they are many.

    Raises:
        InvalidData: they are one, though one that can be taken apart.
    """
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise InvalidData(field, f"must be a list, not {type(values).__name__}")
    return list(values)


def check_mapping(field: str, value: Any) -> None:
    """Says nothing if it is a dictionary.

    Raises:
        InvalidData: it is none.
    """
    if not isinstance(value, dict):
        raise InvalidData(field, f"must be a dictionary, not {type(value).__name__}")


def check_priority(value: Any) -> int:
    """``value``, if a message can have it as its priority.

    Raises:
        InvalidData: naming the rule.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 255:
        raise InvalidData("priority", "must be a whole number from 0 to 255")
    return value


def encode_json(field: str, value: Any, *, limit: int = MAX_PAYLOAD_BYTES) -> str:
    """``value`` as JSON text.

    Raises:
        InvalidData: for what JSON or PostgreSQL's jsonb cannot hold (NaN, bytes, sets, NUL, keys that are not
            strings, …) and for more than ``limit`` bytes. The message names the place, never the value.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        size = len(text.encode())
        # What came through unchanged needs no closer look; tuples and NULs take the slow way.
        if "\\u0000" in text or json.loads(text) != value:
            _check_tree(field, value)
    except (TypeError, ValueError, RecursionError) as error:
        _check_tree(field, value)
        raise InvalidData(field, f"cannot be JSON ({type(error).__name__})") from None
    if size > limit:
        raise InvalidData(field, f"is {size} bytes of JSON; {limit} are allowed (flow_max_payload_bytes)")
    return text


def _check_tree(field: str, value: Any, depth: int = 0) -> None:
    if depth > 200:
        raise InvalidData(field, "is nested too deeply for JSON")
    match value:
        case None | bool() | int():
            return
        case float():
            if not math.isfinite(value):
                raise InvalidData(field, "contains NaN or an infinite number, which JSON does not have")
        case str():
            if _unstorable(value):
                raise InvalidData(field, "contains a NUL character or a lone surrogate, which PostgreSQL cannot store")
        case list() | tuple():
            for number, item in enumerate(value):
                _check_tree(f"{field}[{number}]", item, depth + 1)
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise InvalidData(field, f"has a key that is {type(key).__name__}, not a string")
                if _unstorable(key):
                    raise InvalidData(field, "has a key with a NUL character or a lone surrogate")
                _check_tree(f"{field}.{key}"[:MAX_NAME_CHARS], item, depth + 1)
        case _:
            raise InvalidData(field, f"is {type(value).__name__}, which is not a JSON type")


def _unstorable(text: str) -> bool:
    if "\0" in text:
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
