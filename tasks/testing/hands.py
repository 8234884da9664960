"""The hands of a worker, in this process: what it does with each message, to be done one by one."""

from __future__ import annotations

import itertools
from uuid import UUID

from celery_flows.store.dispatch import Hint
from celery_flows.tasks import maintenance
from celery_flows.tasks.drive import drive
from celery_flows.tasks.runtime import Runtime
from celery_flows.tasks.steps import Delivery, run_step

_deliveries = itertools.count(1)


class Hands:
    """Drives flows and runs steps as a worker does when a message comes, whether or not one has."""

    name = "hands"

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def token(self) -> str:
        """The name of a worker that nobody else has."""
        return f"{self.name}/{next(_deliveries)}"

    def drive(self, flow_id: UUID, worker: str | None = None) -> None:
        """What a worker does with a drive message."""
        drive(self.runtime, flow_id, worker or self.token())

    def run_step(
        self, run_id: str, *, goes_on: bool = True, worker: str | None = None, queue: str | None = None
    ) -> None:
        """What a worker does with a step message; ``goes_on``: it may drive the flow itself when the step is closed."""
        queue = (queue or self.runtime.default_queue()) if goes_on else "no queue of flows"
        run_step(self.runtime, run_id, Delivery(worker or self.token(), queue, False))

    def deliver(self, message: Hint) -> None:
        """What a worker does with this message."""
        if message.kind == "drive":
            self.drive(message.flow_id)
        else:
            self.run_step(message.run_id, queue=message.queue)

    def sweep(self) -> maintenance.SweepReport:
        """One look for due work."""
        return maintenance.sweep(self.runtime)
