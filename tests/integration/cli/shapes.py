"""Holds what was printed as JSON to the shapes that are documented."""

from __future__ import annotations

import types
from itertools import chain
from typing import Any, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict


def misfits(value: Any, shape: Any, at: str = "") -> list[str]:
    """Where ``value`` differs from ``shape``; nothing, if it is as documented."""
    if shape is Any:
        return []
    if is_typeddict(shape):
        return _of_object(value, shape, at)
    origin, arguments = get_origin(shape), get_args(shape)
    if origin in (Union, types.UnionType):
        of_each = [misfits(value, each, at) for each in arguments]
        return [] if [] in of_each else of_each[0]
    if origin is list and isinstance(value, list):
        return [found for number, each in enumerate(value) for found in misfits(each, arguments[0], f"{at}[{number}]")]
    if origin is dict and isinstance(value, dict):
        return [found for key, each in value.items() for found in misfits(each, arguments[1], f"{at}.{key}")]
    is_it = type(value) is (origin or shape)  # a bool is no int here
    return [] if is_it else [f"{at or 'it'} is {value!r}, not {shape}"]


def _of_object(value: Any, shape: Any, at: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{at or 'it'} is {value!r}, not {shape.__name__}"]
    fields = get_type_hints(shape, include_extras=True)
    optional = {name for name, kind in fields.items() if get_origin(kind) is NotRequired}
    lacking = [f"{at}.{name} is missing" for name in sorted(fields.keys() - optional - value.keys())]
    foreign = [f"{at}.{name} is not documented" for name in sorted(value.keys() - fields.keys())]
    kinds = {name: get_args(kind)[0] if name in optional else kind for name, kind in fields.items()}
    inside = [misfits(value[name], kinds[name], f"{at}.{name}") for name in value.keys() & kinds.keys()]
    return [*lacking, *foreign, *chain.from_iterable(inside)]
