"""A few tasks that know nothing of flows, a worker's hands, and the flows that mirror them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery_flows import FlowHandle
from celery_flows.store import FlowStep
from celery_flows.tasks.observer import Observer
from tests.support.bench import Bench
from tests.support.consumer import Consumer


class Refused(Exception):
    pass


class MirroredShop:
    """The tasks of a bench's app, and what is seen of them."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.flows = bench, bench.flows
        self.consumer = Consumer(bench.app, bench.queue)
        self.refusals = 0  # how often pack refuses
        bench.app.conf.update(result_backend="cache+memory://")

        @bench.task("shop.pick")
        def pick(number: int) -> int:
            return number

        @bench.task("shop.pack", bind=True, max_retries=2)
        def pack(self_: Any, number: int) -> int:
            if self.refusals:
                self.refusals -= 1
                raise self_.retry(exc=Refused("the box is too small"), countdown=0)
            return number

        @bench.task("shop.total")
        def total(numbers: list[int]) -> int:
            return sum(numbers)

        @bench.task("shop.refuse")
        def refuse(*_: Any) -> None:
            raise Refused("no")

        @bench.task("shop.order")
        def order(*children: str) -> None:
            for name in children:
                bench.app.tasks[name].delay(1)

        self.pick, self.pack, self.total, self.refuse, self.order = pick, pack, total, refuse, order

    def steps(self, flow: FlowHandle[Any]) -> list[FlowStep]:
        """Oldest first."""
        return self.bench.store.list_steps(flow.id)

    def told(self, flow: FlowHandle[Any]) -> list[str]:
        """Each step as "task status"."""
        return [f"{step.task.removeprefix('shop.')} {step.status}" for step in self.steps(flow)]

    @contextmanager
    def observed(self, patience_seconds: float = 30.0) -> Iterator[None]:
        """As in a worker that mirrors; so patient that what a task did is recorded when it has run, however busy the
        machine is."""
        observer = Observer(self.bench.runtime, patience_seconds)
        observer.connect()
        try:
            yield
        finally:
            observer.disconnect()
