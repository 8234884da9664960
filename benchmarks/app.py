"""What is measured: flows of five steps that do nothing, and the bare Celery chain of five tasks that do nothing."""

from __future__ import annotations

import os
import time

from celery import Celery, chain

from celery_flows import Flows, Limit, Run

STEPS = 5
DONE = "BENCHMARK_DONE"  # names the file that counts ended chains: one byte each

app = Celery("benchmarks")
app.conf.update(task_default_queue="benchmarks", task_ignore_result=True, worker_prefetch_multiplier=4)
flows = Flows(app)


def nothing() -> None:
    """A step."""


@app.task
def pass_on(value: int = 0) -> int:
    """A link of the bare chain."""
    return value + 1


@app.task
def take(ms: int) -> None:
    """A member of a gather."""
    time.sleep(ms / 1000)


@app.task
def end_chain(_: int) -> None:
    """The last link: leaves a byte, for want of a store that knows."""
    descriptor = os.open(os.environ[DONE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, b".")
    os.close(descriptor)


@flows.flow("benchmarks/inline")
def inline(run: Run) -> None:
    """Five recorded steps in the driver's own process."""
    for _ in range(STEPS):
        run.step(nothing)


@flows.flow("benchmarks/limited", limit=Limit(2))
def limited(run: Run) -> None:
    """The same, two at once: most of them queue."""
    for _ in range(STEPS):
        run.step(nothing)


@flows.flow("benchmarks/celery-steps")
def celery_steps(run: Run) -> None:
    """Five Celery steps, a message each."""
    for _ in range(STEPS):
        run.step(pass_on, 0)


@flows.flow("benchmarks/gather")
def gather(run: Run, size_limit_ms: tuple[int, int | None, int]) -> int:
    """So many Celery steps side by side, of which so many are out at once, and each takes so long."""
    size, limit, ms = size_limit_ms
    return len(run.gather([take.s(ms) for _ in range(size)], limit=limit))


def bare_chain() -> None:
    """Starts one chain: nothing of it is durable."""
    chain(pass_on.s(0), *(pass_on.s() for _ in range(STEPS - 2)), end_chain.s()).apply_async()
