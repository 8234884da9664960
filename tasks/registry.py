"""Flow definitions: the registered code, by name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_type_hints

from celery_flows.store.errors import InvalidData
from celery_flows.store.validation import check_name
from celery_flows.tasks.children import ChildFlow
from celery_flows.tasks.errors import UnknownFlow
from celery_flows.tasks.options import StepOptions, check_duration
from celery_flows.tasks.payloads import Codec, codec_for
from celery_flows.tasks.retry import Retry

if TYPE_CHECKING:
    from celery_flows.tasks.handle import FlowHandle
    from celery_flows.tasks.runtime import Runtime
    from celery_flows.tasks.transaction import Transaction

In = TypeVar("In")
Out = TypeVar("Out")


class FlowDefinition(Generic[In, Out]):
    """A flow function and its name. Make one with ``@flows.flow(name)``."""

    def __init__(
        self,
        runtime: Runtime,
        name: str,
        function: Callable[..., Out],
        *,
        queue: str | None = None,
        version: int = 1,
        retry: Retry | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        self.name = check_name("flow name", name)
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise InvalidData(f"version of flow {name}", "must be a whole number from 1")
        self.version = version
        self.queue = queue
        self.function = function
        self.defaults = StepOptions(retry=retry)
        self.timeout = None if timeout is None else check_duration(f"timeout of flow {name}", timeout)
        self._runtime = runtime
        self.takes_input, self.input, self.output = _codecs(name, function)

    def start(
        self,
        input: In | None = None,
        *,
        key: str | None = None,
        owner: str = "default",
        goal: str = "",
        session: Transaction | None = None,
    ) -> FlowHandle[Out]:
        """Starts a flow; once this has committed, the flow reaches a terminal status.

        The flow and the order to drive it are stored in one transaction: yours, if you pass a SQLAlchemy Session or
        Connection as ``session`` (then you commit), else one of its own. The broker is told after the commit; if it
        cannot be reached the sweep tells it later.

        Args:
            input: what the function takes, validated by its annotation.
            key: idempotency key within this definition: the same key again gives the flow that is there.
            owner: the owner session key, e.g. ``tenant:acme``.
            goal: for people.

        Raises:
            InvalidData: the input is not what the function takes, or cannot be JSON. Nothing was written.
            KeyConflict: the key was used with other input.
            StartPending: another transaction that is still open holds the key.
            StoreError: the database could not be reached.
        """
        from celery_flows.tasks.start import start

        return start(self._runtime, self, input, key=key, owner=owner, goal=goal, transaction=session)

    def s(self, input: In | None = None) -> ChildFlow[Out]:
        """This flow with an input, to be run as a step of another: ``run.gather(definition.s(each) for each in …)``."""
        return ChildFlow(self, input)

    def encoded_input(self, input: Any) -> Any:
        """The input as it is stored.

        Raises:
            InvalidData: it is not what the function takes, or cannot be JSON.
        """
        if self.takes_input:
            return json.loads(self.input.encode("input", input, self._runtime.settings.max_payload_bytes))
        if input is not None:
            raise InvalidData("input", f"flow {self.name!r} takes none")
        return None


def _codecs(name: str, function: Callable[..., Any]) -> tuple[bool, Codec, Codec]:
    parameters = list(inspect.signature(function).parameters.values())
    if not 1 <= len(parameters) <= 2:
        raise InvalidData(
            f"flow {name}", "must take the run and at most one input: def flow(run) or def flow(run, input)"
        )
    try:
        hints = get_type_hints(function)
    except NameError as error:
        raise InvalidData(f"flow {name}", f"has an annotation that cannot be resolved: {error}") from None
    takes_input = len(parameters) == 2
    annotation = hints.get(parameters[1].name, Any) if takes_input else None
    return takes_input, codec_for(annotation), codec_for(hints.get("return", Any))


class Registry:
    """The definitions of one application."""

    def __init__(self) -> None:
        self._definitions: dict[str, dict[int, FlowDefinition[Any, Any]]] = {}  # by name and version

    def add(self, definition: FlowDefinition[Any, Any]) -> None:
        """Registers a definition.

        Raises:
            InvalidData: another function has this name and version. The same one again, as when a module is reloaded,
                replaces it.
        """
        versions = self._definitions.setdefault(definition.name, {})
        known = versions.get(definition.version)
        if known is not None and _origin(known.function) != _origin(definition.function):
            raise InvalidData("flow name", f"{definition.name!r} is taken by {'.'.join(_origin(known.function))}")
        versions[definition.version] = definition

    def get(self, name: str, version: int | None = None) -> FlowDefinition[Any, Any] | None:
        """The definition of this name and version; None: the latest."""
        versions = self._definitions.get(name, {})
        return versions.get(max(versions, default=0) if version is None else version)

    def require(self, name: str) -> FlowDefinition[Any, Any]:
        """The latest definition of this name.

        Raises:
            UnknownFlow: naming those there are.
        """
        definition = self.get(name)
        if definition is None:
            raise UnknownFlow(name, list(self._definitions))
        return definition

    def __iter__(self) -> Iterator[FlowDefinition[Any, Any]]:
        """The latest definition of each name."""
        return (versions[max(versions)] for versions in self._definitions.values())


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    return function.__module__, function.__qualname__
