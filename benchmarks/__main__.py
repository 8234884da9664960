"""``python -m benchmarks``: throughput and latency beside a bare Celery chain, in interleaved rounds on this machine.

The database is FLOW_STORE_URL, else SQLite in a temporary file; the broker CELERY_BROKER_URL, else an embedded Redis.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from celery_flows import FlowHandle, SqlFlowStore
from celery_flows.worker.embedded import Processes, await_fact, start_broker

console = Console(highlight=False)


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--flows", "count", type=click.IntRange(10), default=150, show_default=True, help="Flows a round.")
@click.option("-c", "--concurrency", type=click.IntRange(1), default=2, show_default=True, help="Worker processes.")
@click.option("--json", "file", type=click.Path(path_type=Path, dir_okay=False), default=Path("benchmarks.json"))
def main(rounds: int, count: int, concurrency: int, file: Path) -> None:
    """Measures, prints a table, and writes the figures to a file."""
    with tempfile.TemporaryDirectory(prefix="celery-flows-") as scratch, Processes(Path(scratch)) as processes:
        done = Path(scratch) / "done"
        os.environ["BENCHMARK_DONE"] = str(done)
        store = start_worker(processes, concurrency)
        figures = _measure(rounds, count, done)
    _report(store, figures, file)


def start_worker(processes: Processes, concurrency: int) -> str:
    """Starts broker and worker, and waits until it takes messages; gives the kind of the database."""
    os.environ.setdefault("FLOW_STORE_URL", f"sqlite:///{processes.directory / 'flows.db'}")
    os.environ["CELERY_BROKER_URL"] = start_broker(processes)
    store = SqlFlowStore.open(os.environ["FLOW_STORE_URL"])
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.app", "worker", "-c", str(concurrency)]
    # At level info Celery logs each message, which costs all ways alike; "ready" is at that level too.
    worker = processes.start("worker", [*command, "--without-gossip", "--without-mingle", "-l", "info"])
    log = processes.log_of("worker")
    await_fact(lambda: b" ready." in log.read_bytes(), worker, log)
    return store.engine.dialect.name


def _measure(rounds: int, count: int, done: Path) -> dict[str, list[float]]:
    from benchmarks import app  # after the environment is set

    ways: dict[str, Callable[[], float]] = {
        "bare Celery chain": lambda: _chains(app.bare_chain, count, done),
        "inline steps": lambda: _flows(app.inline.start, count),
        "inline steps, two flows at once": lambda: _flows(app.limited.start, count),
        "Celery steps": lambda: _flows(app.celery_steps.start, count // 3),
    }
    figures: dict[str, list[float]] = {name: [] for name in [*ways, "latency ms"]}
    _flows(app.inline.start, 5)  # connections, imports
    for number in range(rounds):
        for name, way in ways.items():
            figures[name].append(way())
            console.print(f"round {number + 1} of {rounds}: {name}: {figures[name][-1]:.0f} steps/s")
        figures["latency ms"] += [_latency(app.inline.start) for _ in range(10)]
    return figures


def _chains(start: Callable[[], None], count: int, done: Path) -> float:
    done.write_bytes(b"")
    began = time.perf_counter()
    for _ in range(count):
        start()
    _until(lambda: done.stat().st_size >= count)
    return count * 5 / (time.perf_counter() - began)


def _flows(start: Callable[[], FlowHandle[None]], count: int) -> float:
    began = time.perf_counter()
    handles = [start() for _ in range(count)]
    for handle in handles:
        handle.result(timeout=120)
    return count * 5 / (time.perf_counter() - began)


def _latency(start: Callable[[], FlowHandle[None]]) -> float:
    began = time.perf_counter()
    start().result(timeout=60)
    return (time.perf_counter() - began) * 1000


def _until(fact: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > deadline:
            raise click.ClickException("the chains have not ended in time")
        time.sleep(0.005)


def _report(store: str, figures: dict[str, list[float]], file: Path) -> None:
    bare = statistics.median(figures["bare Celery chain"])
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    title = f"{machine}, Python {platform.python_version()}, Celery {version('celery')}, {store}"
    table = Table("what", "median", "range", "x bare chain", title=title, title_justify="left")
    for name, values in figures.items():
        unit = "ms" if name.endswith("ms") else "steps/s"
        ratio = "" if unit == "ms" else f"{statistics.median(values) / bare:.2f}"
        spread = f"{min(values):.0f} to {max(values):.0f}"
        table.add_row(name, f"{statistics.median(values):.0f} {unit}", spread, ratio)
    console.print(table)
    file.write_text(json.dumps({"machine": title, "figures": figures}, indent=2) + "\n")
    console.print(f"figures: {file}")


if __name__ == "__main__":
    main()
