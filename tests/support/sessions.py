"""Two sessions of one PostgreSQL database, step by step: what the one holds, the other waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from tests.support.waiting import until, waits_for_lock

P = ParamSpec("P")
T = TypeVar("T")
Operation = Callable[Concatenate[sa.Connection, P], T]


class Waiting:
    """An operation in a session of its own that has been seen to wait for a lock."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def result(self) -> Any:
        """What it gave, or raises what it raised, once it was let go on; it has committed then."""
        return self._future.result(10)


class Sessions:
    """Opens transactions, and runs operations in others that must wait for them."""

    def __init__(self, url: str) -> None:
        self.engine = sa.create_engine(url, poolclass=NullPool, connect_args={"options": "-c lock_timeout=8000"})
        self._threads = ThreadPoolExecutor(4)

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """An open transaction; the test commits it, or it is rolled back."""
        with self.engine.connect() as connection:
            yield connection

    def blocked(self, operation: Operation[P, T], *args: P.args, **kwargs: P.kwargs) -> Waiting:
        """Starts the operation in a transaction of its own; returns when it waits for a lock."""

        def run() -> T:
            with self.engine.begin() as connection:
                return operation(connection, *args, **kwargs)

        future = self._threads.submit(run)
        until(lambda: waits_for_lock(self.engine) or future.done(), "it waits for a lock")
        assert not future.done(), f"it did not wait: {future.result()}"
        return Waiting(future)

    def close(self) -> None:
        self._threads.shutdown()
        self.engine.dispose()
