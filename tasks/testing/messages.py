"""The broker of a test: a list of messages, delivered in order, and lost or doubled where the test says so."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from celery_flows.store.dispatch import Hint
from celery_flows.tasks.testing.asked import check_name, check_times
from celery_flows.tasks.testing.names import is_meant


@dataclass
class _Fault:
    what: Literal["drop", "duplicate"]
    name: str | None
    left: int

    def __str__(self) -> str:
        return f"flow_messages.{self.what}({'' if self.name is None else repr(self.name)})"


class FlowMessages:
    """The messages between store and workers. A message carries ids only: it says where to look."""

    def __init__(self, default_queue: Callable[[], str]) -> None:
        self.sent: list[Hint] = []  # all of them, oldest first: task, queue, priority, …
        self._default_queue = default_queue
        self._waiting: deque[Hint] = deque()
        self._faults: list[_Fault] = []

    def drop(self, name: str | None = None, *, times: int = 1) -> None:
        """The next message for the flow definition or task of this name gets lost; None: the next of all.

        The store sends it again when nobody has come for a while. The test fails if there is no such message.

        Raises:
            InvalidData: ``name`` is none, or ``times`` is no number from 1.
        """
        self._add(_Fault("drop", name, times))

    def duplicate(self, name: str | None = None, *, times: int = 1) -> None:
        """The next such message is delivered twice; as :meth:`drop` otherwise."""
        self._add(_Fault("duplicate", name, times))

    # ---- for the kit ----

    def publish(self, *hints: Hint) -> int:
        """Sends messages, as the publisher does."""
        for each in hints:
            hint = replace(each, queue=each.queue or self._default_queue())
            self.sent.append(hint)
            self._waiting.extend([hint] * self._copies(hint))
        return len(hints)

    def take(self) -> Hint | None:
        """The next message to deliver."""
        return self._waiting.popleft() if self._waiting else None

    def spared(self) -> Iterator[tuple[str, str | None]]:
        """The faults that have not struck as often as they were to: how they were asked for, and for which name."""
        return ((str(fault), fault.name) for fault in self._faults if fault.left)

    def _add(self, fault: _Fault) -> None:
        if fault.name is not None:
            check_name(f"flow_messages.{fault.what}", fault.name)
        check_times(f"flow_messages.{fault.what}", fault.left)
        self._faults.append(fault)

    def _copies(self, hint: Hint) -> int:
        for fault in self._faults:
            if fault.left and (fault.name is None or is_meant(hint.task, fault.name)):
                fault.left -= 1
                return 0 if fault.what == "drop" else 2
        return 1
