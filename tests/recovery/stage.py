"""What one round plays on: a shop with default settings, its workers, and flows whose middle step is held at a gate."""

from __future__ import annotations

import os
import signal
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kombu import pools

from celery_flows import FlowCancelled, FlowFailed, FlowHandle, ResultTimedOut
from celery_flows.tasks.settings import FlowSettings
from tests.recovery.proof import promise, proof
from tests.support.brokers import Broker, new_queue
from tests.support.fold import assert_whole
from tests.support.shop import BROKER, DATABASE, DEFAULTS, EFFECTS, QUEUE, open_shop
from tests.support.waiting import until
from tests.support.workers import Worker, is_alive

START_SECONDS, RECOVERY_SECONDS, RESULT_SECONDS = 30.0, 120.0, 60.0


class Stage:
    """One round's shop, workers and flows. Each flow has three steps: one inline, the held Celery step, one inline."""

    def __init__(self, broker: Broker, database_url: str, directory: Path) -> None:
        self.broker, self.directory, self.queue = broker, directory, new_queue()
        self.environment = {
            BROKER: broker.url, DATABASE: database_url, QUEUE: self.queue,
            EFFECTS: str(directory / "effects.jsonl"), DEFAULTS: "yes",
        }  # fmt: skip
        self.shop = open_shop(self.environment)
        assert self.shop.flows.settings == FlowSettings(store_url=database_url), "the settings are the defaults"
        self.flows: dict[str, FlowHandle[str]] = {}
        self.doubled: set[str] = set()  # the flows whose held step has to run a second time
        self._workers: list[Worker] = []
        self._stack = ExitStack()
        self._stack.callback(self.shop.app.close)
        self._stack.callback(pools.reset)
        self._stack.callback(lambda: self.shop.flows.store.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    # ---- its play ----

    def worker(self, *options: str, **environment: str) -> Worker:
        """Starts one more worker, and waits until it is ready."""
        own = {"TMPDIR": str(self.directory)}  # what a killed process cannot clean up goes with the round
        worker = Worker({**self.environment, **own, **environment}, self.directory, *options)
        self._stack.callback(worker.end)
        self._workers.append(worker)
        worker.wait_ready()
        return worker

    def start(self, *labels: str) -> None:
        """Starts flows."""
        for label in labels:
            self.flows[label] = self.shop.held_step.start(label)

    def hold(self, label: str) -> int:
        """Starts a flow and waits until its middle step is held; gives the process that runs it."""
        self.start(label)
        with proof("the step was running"):
            until(lambda: self.begins(label), "it began", within_seconds=START_SECONDS)
            pid: int = self.begins(label)[0]["pid"]
            assert is_alive(pid), f"process {pid} is there"
        return pid

    def open_gate(self) -> None:
        """Held steps go on."""
        self.shop.open_gate()

    def await_waiting(self, count: int) -> None:
        """Waits until this many messages wait in the broker."""
        with proof(f"{count} messages waited"):
            until(lambda: self.broker.count(self.queue) == count, f"the queue holds {count}")

    def kill(self, pid: int, with_signal: signal.Signals = signal.SIGKILL) -> None:
        """Ends one process, and sees it dead."""
        os.kill(pid, with_signal)
        self.await_death(pid)

    def await_death(self, pid: int) -> None:
        """Waits until a process is dead."""
        with proof(f"process {pid} died"):
            until(lambda: not is_alive(pid), "it is dead", within_seconds=START_SECONDS)

    # ---- what is seen ----

    def begins(self, label: str) -> list[dict[str, Any]]:
        """Each begin of a flow's held step."""
        return self.shop.effects.read(f"{label} began")

    def began_again(self, label: str) -> float:
        """The moment at which a struck step began again."""
        self.doubled.add(label)
        return self._nth(label, 2)

    def began(self, *labels: str) -> float:
        """The moment by which the held steps of all these flows had begun."""
        return max(self._nth(label, 1) for label in labels)

    def _nth(self, label: str, times: int) -> float:
        return self.moment(f"{label} began", times)

    def moment(self, effect: str, times: int = 1) -> float:
        """When an effect was had for the n-th time."""

        def seen() -> list[dict[str, Any]]:
            return self.shop.effects.read(effect)[times - 1 : times]

        with promise("the work goes on"):
            at: float = until(seen, f"{effect!r}, time {times}", within_seconds=RECOVERY_SECONDS)[0]["at"]
        return at

    # ---- what must hold in the end ----

    def check(self) -> None:
        """Every flow ends with its result, what was recorded ran once, and every history is whole.

        Raises:
            Broken: naming the first that is not so.
        """
        for label, flow in self.flows.items():
            with promise(f"flow {label!r} ends"):
                with suppress(ResultTimedOut, FlowFailed, FlowCancelled):
                    flow.result(RESULT_SECONDS)
                row = flow.get()
                assert (row.status, row.result_json) == ("finished", label), f"it is {row.status}, {row.result_json!r}"
            with promise(f"history of flow {label!r} is whole"):
                assert_whole(self.shop.flows.store, flow.id)
        with promise("what is recorded ran once"):
            ran = Counter({name: count for name, count in self.shop.effects.counts().items() if "ended" not in name})
            assert ran == self._expected(), f"{dict(ran)} in place of {dict(self._expected())}"

    def _expected(self) -> Counter[str]:
        begins = Counter({f"{label} began": 1 + (label in self.doubled) for label in self.flows})
        return begins + Counter(before=len(self.flows), after=len(self.flows))

    def logs(self) -> str:
        """What the workers said."""
        return "\n".join(f"--- {worker.name}\n{worker.output}" for worker in self._workers)
