"""Flow definitions: the registered code, by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from celery_flows.store.changes import Drive
from celery_flows.store.errors import InvalidData
from celery_flows.store.models import Flow
from celery_flows.store.validation import MAX_PAYLOAD_BYTES, check_list, check_name, check_priority
from celery_flows.tasks.children import ChildFlow
from celery_flows.tasks.errors import UnknownFlow
from celery_flows.tasks.handle import FlowHandle
from celery_flows.tasks.limit import Limit
from celery_flows.tasks.loop import is_async
from celery_flows.tasks.options import StepOptions, check_duration, check_retry
from celery_flows.tasks.parameters import Parameters
from celery_flows.tasks.retry import Retry
from celery_flows.tasks.schedule import Schedule
from celery_flows.tasks.start import Options, start
from celery_flows.tasks.start_async import AsyncStarts
from celery_flows.tasks.start_many import start_many, wanted
from celery_flows.tasks.transaction import Transaction

if TYPE_CHECKING:
    from celery_flows.tasks.runtime import Runtime

In = TypeVar("In")
Out = TypeVar("Out")


class FlowDefinition(AsyncStarts[In, Out]):
    """A flow function and its name. Make one with ``@flows.flow(name)``."""

    def __init__(
        self,
        runtime: Runtime,
        name: str,
        function: Callable[..., Any],
        *,
        queue: str | None = None,
        version: int = 1,
        retry: Retry | None = None,
        timeout: timedelta | None = None,
        retain: timedelta | None = None,
        priority: int | None = None,
        schedule: Schedule | None = None,
        limit: Limit | None = None,
    ) -> None:
        self.name = check_name("flow name", name)
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise InvalidData(f"version of flow {name}", "must be a whole number from 1")
        self.version = version
        self.queue = None if queue is None else check_name(f"queue of flow {name}", queue)
        self.priority = None if priority is None else check_priority(priority)
        self.schedule = schedule
        self.function = function
        self.is_async = is_async(function)
        self.defaults = StepOptions(retry=None if retry is None else check_retry(f"retry of flow {name}", retry))
        self.timeout = None if timeout is None else check_duration(f"timeout of flow {name}", timeout)
        self.retain_seconds = None if retain is None else _seconds_kept(name, retain)
        self._runtime = runtime
        parameters = Parameters.of(name, function)
        self.takes_input, self.input, self.output = parameters.takes_input, parameters.input, parameters.output
        self.default = parameters.default
        if schedule is not None:
            _check_takes_a_slot(self)
        self.limit = limit
        if limit is not None:
            _check_limit(self, limit)

    def start(
        self,
        input: In | None = None,
        *,
        key: str | None = None,
        owner: str = "default",
        goal: str = "",
        priority: int | None = None,
        countdown: float | timedelta | None = None,
        eta: datetime | None = None,
        session: Transaction | None = None,
    ) -> FlowHandle[Out]:
        """Starts a flow; once this has committed, the flow reaches a terminal status.

        The flow and the order to drive it are stored in one transaction: yours, if you pass a SQLAlchemy Session or
        Connection as ``session`` (then you commit), else one of its own. The broker is told after the commit; if it
        cannot be reached the sweep tells it later.

        Args:
            input: what the function takes, validated by its annotation; None: the parameter's default, if it has one.
            key: idempotency key within this definition: the same key again gives the flow that is there, or the last
                that has gone on for it.
            owner: the owner session key, e.g. ``tenant:acme``.
            goal: for people.
            priority: of its messages, 0 to 255, as your broker has it; None: the definition's.
            countdown: seconds, or a timedelta, before it begins, by the database's clock. Nothing is sent before.
            eta: the time at which it begins, with a time zone; one that has passed is due at once.

        Raises:
            InvalidData: the input is not what the function takes, or cannot be JSON. Nothing was written.
            KeyConflict: the key was used with other input, for a flow that has not started anew.
            StartPending: another transaction that is still open holds the key. Nothing was written; yours can go on.
            StoreError: the database could not be reached.
        """
        return start(self._runtime, self, input, key, Options(owner, goal, priority, countdown, eta), session)

    def start_many(
        self,
        inputs: Iterable[In | None],
        *,
        keys: Iterable[str | None] | None = None,
        owner: str = "default",
        goal: str = "",
        priority: int | None = None,
        countdown: float | timedelta | None = None,
        eta: datetime | None = None,
        session: Transaction | None = None,
    ) -> list[FlowHandle[Out]]:
        """Starts a flow for each input, all in one transaction or none; gives their handles in order.

        Workers find them by their sweeps: no message is sent for each, so it takes seconds for thousands, and a broker
        that cannot be reached holds up nothing. The options are those of :meth:`start`, and hold for each.

        Args:
            inputs: what the function takes, one for each flow. All are held in memory.
            keys: an idempotency key, or None, for each input: one that was used before gives the flow that is there.

        Raises:
            InvalidData: naming an input or key by its number. Nothing was written.
            KeyConflict: a key was used with other input, for a flow that has not started anew. Nothing was written.
            StartPending: another transaction that is still open holds one of the keys. Nothing was written; yours can
                go on.
            StoreError: the database could not be reached.
        """
        options = Options(owner, goal, priority, countdown, eta)
        asked = wanted(self, check_list("inputs", inputs), None if keys is None else check_list("keys", keys), options)
        return start_many(self._runtime, self, asked, options, session)

    def s(self, input: In | None = None) -> ChildFlow[Out]:
        """This flow with an input, to be run as a step of another: ``run.gather(definition.s(each) for each in …)``."""
        return ChildFlow(self, input)

    def new_flow(self, **fields: Any) -> Flow:
        """A flow of this definition, which nobody has stored yet."""
        return Flow(
            controller_id=self.name, definition_version=self.version, retain_seconds=self.retain_seconds, **fields
        )

    def encoded_input(self, input: Any) -> Any:
        """The input as it is stored.

        Raises:
            InvalidData: it is not what the function takes, or cannot be JSON.
        """
        text = self.encoded_text(input)
        return None if text is None else json.loads(text)

    def encoded_text(self, input: Any) -> str | None:
        """:meth:`encoded_input` as JSON text."""
        if self.takes_input:
            given = self.default if input is None else input
            text = self.input.encode("input", given, self._runtime.settings.max_payload_bytes)
            return None if text == "null" else text
        if input is not None:
            raise InvalidData("input", f"flow {self.name!r} takes none")
        return None

    def drive_row(self, limit_key: str | None, priority: int | None = None) -> Drive:
        """The drive row of a new flow, which begins as soon as it can; without a priority of its own it has the
        definition's."""
        if priority is None:
            priority = self.priority
        return Drive(self.name, self.queue, priority, self._runtime.first_pause, limit_key=limit_key)

    def limit_key(self, encoded: Any) -> str | None:
        """What a flow with this input, as stored, shares its limit with; None: it has no limit.

        Raises:
            InvalidData: the limit's ``per`` gives no key.
        """
        if self.limit is None:
            return None
        return self.limit.key(self.name, self.input.decode("input", encoded) if self.limit.per else None)


def _check_limit(definition: FlowDefinition[Any, Any], limit: Any) -> None:
    if not isinstance(limit, Limit):
        raise InvalidData(f"limit of flow {definition.name}", "must be a Limit(…)")
    if limit.per is not None and not definition.takes_input:
        raise InvalidData(f"limit of flow {definition.name}", "has per=, and the flow takes no input")


def _seconds_kept(name: str, retain: Any) -> int:
    if not isinstance(retain, timedelta) or retain < timedelta(0):
        raise InvalidData(f"retain of flow {name}", "must be a timedelta, and not negative")
    return math.ceil(retain.total_seconds())


def _check_takes_a_slot(definition: FlowDefinition[Any, Any]) -> None:
    if definition.takes_input:
        try:
            definition.input.encode("input", datetime.now(UTC), MAX_PAYLOAD_BYTES)
        except InvalidData:
            raise InvalidData(
                f"flow {definition.name}", "has a schedule: its input must be a datetime, the slot it is for, or none"
            ) from None


class Registry:
    """The definitions of one application."""

    def __init__(self) -> None:
        self._definitions: dict[str, dict[int, FlowDefinition[Any, Any]]] = {}  # by name and version
        self._own: dict[str, FlowDefinition[Any, Any]] = {}

    def add(self, definition: FlowDefinition[Any, Any]) -> None:
        """Registers a definition.

        Raises:
            InvalidData: another function has this name and version. The same one again, as when a module is reloaded,
                replaces it.
        """
        if definition.name in self._own:
            raise InvalidData("flow name", f"{definition.name!r} is taken by celery-flows itself")
        versions = self._definitions.setdefault(definition.name, {})
        known = versions.get(definition.version)
        if known is not None and _origin(known.function) != _origin(definition.function):
            raise InvalidData("flow name", f"{definition.name!r} is taken by {'.'.join(_origin(known.function))}")
        versions[definition.version] = definition

    def add_own(self, definition: FlowDefinition[Any, Any]) -> None:
        """Registers a definition of the engine's own: it is found, and not listed."""
        self._own[definition.name] = definition

    def get(self, name: str, version: int | None = None) -> FlowDefinition[Any, Any] | None:
        """The definition of this name and version; None: the latest."""
        if (own := self._own.get(name)) is not None:
            return own
        versions = self._definitions.get(name, {})
        return versions.get(max(versions, default=0) if version is None else version)

    def require(self, name: str, version: int | None = None) -> FlowDefinition[Any, Any]:
        """The definition of this name and version; None: the latest.

        Raises:
            UnknownFlow: naming those there are.
        """
        definition = self.get(name, version)
        if definition is None:
            raise UnknownFlow(name, list(self._definitions), version if name in self._definitions else None)
        return definition

    def __iter__(self) -> Iterator[FlowDefinition[Any, Any]]:
        """The latest definition of each name."""
        return (versions[max(versions)] for versions in self._definitions.values())


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    return function.__module__, function.__qualname__
