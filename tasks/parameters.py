"""What a flow function takes and gives, by its signature and annotations."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Self, get_type_hints

from celery import Task

from celery_flows.store.errors import InvalidData
from celery_flows.store.validation import MAX_PAYLOAD_BYTES
from celery_flows.tasks.loop import is_async
from celery_flows.tasks.payloads import Codec, codec_for
from celery_flows.tasks.run import Run
from celery_flows.tasks.run_async import AsyncRun

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, slots=True)
class Parameters:
    """How a flow's input and result are written and read."""

    takes_input: bool
    input: Codec
    output: Codec
    default: Any = None  # of the input, where none is given

    @classmethod
    def of(cls, name: str, function: Any) -> Self:
        """Those of this function.

        Raises:
            InvalidData: it cannot be a flow's; says what to write.
        """
        _check_function(name, function)
        parameters = list(inspect.signature(function).parameters.values())
        if not 1 <= len(parameters) <= 2 or any(parameter.kind not in _BY_POSITION for parameter in parameters):
            raise InvalidData(
                f"flow {name}",
                "must take the run and at most one input, by position: def flow(run) or def flow(run, input)",
            )
        try:
            hints = get_type_hints(function)
        except NameError as error:
            raise InvalidData(f"flow {name}", f"has an annotation that cannot be resolved: {error}") from None
        _check_run(name, hints.get(parameters[0].name), awaited=is_async(function))
        output = codec_for(hints.get("return", Any))
        if len(parameters) == 1:
            return cls(False, codec_for(None), output)
        input = codec_for(hints.get(parameters[1].name, Any))
        return cls(True, input, output, _default(name, parameters[1], input))


def _check_function(name: str, function: Any) -> None:
    if isinstance(function, Task):
        raise InvalidData(f"flow {name}", "must be a function, not a Celery task")
    if not callable(function) or isinstance(function, type) or not hasattr(function, "__qualname__"):
        raise InvalidData(f"flow {name}", f"must be a function, not {_kind_of(function)}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise InvalidData(f"flow {name}", "yields, and is called as a function that returns; write return")


def _kind_of(value: Any) -> str:
    return "a class" if isinstance(value, type) else type(value).__name__


def _default(name: str, parameter: inspect.Parameter, codec: Codec) -> Any:
    if parameter.default is inspect.Parameter.empty:
        return None
    try:
        codec.encode(f"default of {parameter.name} in flow {name}", parameter.default, MAX_PAYLOAD_BYTES)
    except InvalidData as error:
        raise InvalidData(error.field, f"does not fit its annotation: {error.rule}") from None
    return parameter.default


def _check_run(name: str, annotation: Any, *, awaited: bool) -> None:
    if annotation is Run and awaited:
        raise InvalidData(f"flow {name}", "is async and takes a Run; write: run: AsyncRun")
    if annotation is AsyncRun and not awaited:
        raise InvalidData(f"flow {name}", "takes an AsyncRun and is not async; write async def, or: run: Run")
