"""The hands of a Celery worker in this process: takes messages off a queue and runs them, one by one.

Everything a task's own process does is Celery's: request, trace, signals, result backend.
"""

from __future__ import annotations

from typing import Any

from celery import Celery
from celery.worker import state
from celery.worker.request import Request

LIMIT = 1000  # messages: more than that spins


class Consumer:
    """Runs what an app's queue holds."""

    def __init__(self, app: Celery, queue: str) -> None:
        self._app, self._queue = app, queue

    def take(self) -> Request | None:
        """The next message, as a worker has it; None: there is none."""
        app = self._app
        with app.connection_for_read() as connection, connection.channel() as channel:
            bound = app.amqp.queues[self._queue](channel)
            bound.declare()
            message: Any = bound.get(no_ack=True)
        return None if message is None else Request(message, app=app, hostname="consumer")

    def run(self, request: Request) -> Any:
        """What a worker does with a request: runs it, unless it was revoked."""
        return None if request.revoked() else request.execute()

    def run_next(self) -> str:
        """Runs the next message; gives its task's name."""
        request = self.take()
        assert request is not None, "the queue is empty"
        self.run(request)
        return str(request.task_name)

    def run_all(self) -> list[str]:
        """Runs what there is, and what comes of it, until nothing is left."""
        names: list[str] = []
        while (request := self.take()) is not None:
            assert len(names) < LIMIT, names[-10:]
            self.run(request)
            names.append(str(request.task_name))
        return names

    @staticmethod
    def revoke(*task_ids: str) -> None:
        """Has this worker know that tasks are revoked."""
        for task_id in task_ids:
            state.revoked.add(task_id)
