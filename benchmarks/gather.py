"""``python -m benchmarks.gather``: whether a gather of ten times as many Celery steps takes ten times as long.

The database is FLOW_STORE_URL, else SQLite in a temporary file; the broker CELERY_BROKER_URL, else an embedded Redis.
"""

from __future__ import annotations

import tempfile
from datetime import datetime
from pathlib import Path
from uuid import UUID

import click
from rich.console import Console
from rich.table import Table

from benchmarks.__main__ import start_worker
from celery_flows.store import FlowStep
from celery_flows.worker.embedded import Processes

console = Console(highlight=False)

SIZES = (1_000, 3_000, 10_000)
SECONDS_EACH = 0.1  # that a member may take before the measurement is given up


@click.command()
@click.argument("sizes", type=click.IntRange(1), nargs=-1)
@click.option("--limit", type=click.IntRange(1), help="Members that are out at once; else all are.")
@click.option("--ms", type=click.IntRange(0), default=0, show_default=True, help="What each member takes by itself.")
@click.option("-c", "--concurrency", type=click.IntRange(1), default=2, show_default=True, help="Worker processes.")
def main(sizes: tuple[int, ...], limit: int | None, ms: int, concurrency: int) -> None:
    """Gathers SIZES Celery steps (1,000, 3,000 and 10,000), and prints a table."""
    with tempfile.TemporaryDirectory(prefix="celery-flows-") as scratch, Processes(Path(scratch)) as processes:
        store = start_worker(processes, concurrency)
        log = processes.log_of("worker")
        out = "all out at once" if limit is None else f"{limit} out at once"
        table = Table(
            "members",
            "seconds",
            "ms each",
            "until out",
            "after the last",
            "drives",
            "messages",
            title=f"{store}, {out}",
        )
        _gather(log, 10, limit, 0)  # connections, imports
        for size in sizes or SIZES:
            table.add_row(f"{size:,}", *_gather(log, size, limit, ms))
            console.print(f"{size:,} members are done")
    console.print(table)


def _gather(log: Path, size: int, limit: int | None, ms: int) -> list[str]:
    from benchmarks import app  # after the environment is set

    before = _count_messages(log)
    handle = app.gather.start((size, limit, ms))
    assert handle.result(timeout=30 + size * (SECONDS_EACH + ms / 1000)) == size
    flow, steps = handle.get(), app.flows.store.list_steps(handle.id)
    assert flow.finished_at is not None
    app.gather.start((1, None, 0)).result(timeout=300)  # what still lies in the queue comes before it
    messages = _count_messages(log) - before - 1
    took, drives = _seconds(flow.created_at, flow.finished_at), _count_drives(handle.id)
    until_out, after = _until_out(flow.created_at, steps), _seconds(_last_end(steps), flow.finished_at)
    return [
        f"{took:.1f}",
        f"{took * 1000 / size:.2f}",
        f"{until_out:.2f} s",
        f"{after:.2f} s",
        str(drives),
        f"{messages:,}",
    ]


def _until_out(began: datetime, steps: list[FlowStep]) -> float:
    return _seconds(began, max(step.created_at for step in steps))


def _last_end(steps: list[FlowStep]) -> datetime:
    return max(step.updated_at for step in steps)


def _count_drives(flow_id: UUID) -> int:
    from benchmarks import app

    events = app.flows.store.list_events(flow_id, None)
    return sum(event.kind in ("started", "resumed", "reclaimed") for event in events)


def _count_messages(log: Path) -> int:
    """For members: those that the worker has received."""
    lines = log.read_text(errors="replace").splitlines()
    return sum("benchmarks.app.take[" in line and line.endswith(" received") for line in lines)


def _seconds(begin: datetime, end: datetime) -> float:
    return (end - begin).total_seconds()


if __name__ == "__main__":
    main()
