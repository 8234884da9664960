"""Keeps forks and transactions apart, for databases whose locks are the process's own, as SQLite's are.

SQLite keeps what its connections hold locked in the memory of the process. A child that is forked in the middle of a
transaction inherits "locked", and nobody in it will ever unlock: every write of its is told that the database is busy.
A child that inherits an idle connection believes that it holds its parent's locks; when the parent closes the file, the
log of what was written is deleted under the child, and its commits with it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakSet

LONGEST_SECONDS = 15.0  # a fork waits for transactions, and these for the database's one writer, but not for ever


class Closable(Protocol):
    """What keeps connections open, and can close those that are idle."""

    def dispose(self) -> None: ...


class ForkGate:
    """Transactions go through side by side; a fork waits until none is open, closes idle connections, and holds new
    transactions up meanwhile."""

    def __init__(self) -> None:
        self.closed_first: WeakSet[Closable] = WeakSet()
        self._reset()
        os.register_at_fork(before=self._close, after_in_parent=self._open, after_in_child=self._reset)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Around a transaction. One within another of the same thread goes through: a fork waits for both."""
        depth = getattr(self._mine, "depth", 0)
        with self._changed:
            if depth == 0:
                self._changed.wait_for(lambda: self._forks == 0, LONGEST_SECONDS)
            self._open_transactions += 1
        self._mine.depth = depth + 1
        try:
            yield
        finally:
            self._mine.depth = depth
            with self._changed:
                self._open_transactions -= 1
                self._changed.notify_all()

    def _close(self) -> None:
        own = getattr(self._mine, "depth", 0)  # who forks within a transaction waits for others' alone
        with self._changed:
            self._forks += 1
            self._changed.wait_for(lambda: self._open_transactions <= own, LONGEST_SECONDS)
        for each in list(self.closed_first):
            each.dispose()

    def _open(self) -> None:
        with self._changed:
            self._forks -= 1
            self._changed.notify_all()

    def _reset(self) -> None:
        """In the child, of whose threads only the one that forked is left."""
        self._changed = threading.Condition()
        self._mine = threading.local()
        self._forks = 0
        self._open_transactions = 0
