"""``celery-flows dev``: store, broker, worker, beat and Flower in one command, taken down together."""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import click
from kombu.utils.url import maybe_sanitize_url

from celery_flows.store import FlowError, SqlFlowStore
from celery_flows.worker import output
from celery_flows.worker.embedded import Processes, await_fact, start_broker

SHARED = ("FLOW_STORE_URL", "CELERY_BROKER_URL")  # what another terminal needs to talk to the same flows


@click.command()
@click.option("-A", "--app", default="celery_flows.worker", show_default=True, help="The Celery app with your flows.")
@click.option(
    "--directory", type=click.Path(path_type=Path, file_okay=False), default=Path(".celery-flows"), show_default=True,
    help="Where the embedded database, the broker's files and the logs go.",
)  # fmt: skip
@click.option("-c", "--concurrency", type=click.IntRange(1, 64), default=2, show_default=True, help="Worker processes.")
@click.option("--flower-port", type=click.IntRange(1, 65_535), default=5555, show_default=True)
@click.option("-l", "--loglevel", default="info", show_default=True)
def dev(app: str, directory: Path, concurrency: int, flower_port: int, loglevel: str) -> None:
    """Runs everything here: SQLite, a Redis of its own, worker, beat, and Flower if it is installed.

    What is configured is used instead: FLOW_STORE_URL for the database, CELERY_BROKER_URL for the broker. Ends on
    Ctrl-C or SIGTERM, and takes all of it down.
    """
    stopped = threading.Event()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: stopped.set())
    try:
        with Processes(directory) as processes:
            _start(processes, app, concurrency, flower_port, loglevel)
            _watch(processes, stopped)
    except FlowError as error:
        raise click.ClickException(str(error)) from error


def _start(processes: Processes, app: str, concurrency: int, flower_port: int, loglevel: str) -> None:
    store_url = os.environ.get("FLOW_STORE_URL") or f"sqlite:///{processes.directory.resolve() / 'flows.db'}"
    SqlFlowStore.open(store_url).close()
    broker_url = start_broker(processes)
    processes.environment = {"FLOW_STORE_URL": store_url, "CELERY_BROKER_URL": broker_url, "PYTHONPATH": _python_path()}
    celery = [sys.executable, "-m", "celery", "-A", app]
    ready = processes.directory / "worker.log"
    mark = ready.stat().st_size if ready.exists() else 0
    worker = processes.start("worker", [*celery, "worker", "-E", "-c", str(concurrency), "-l", loglevel])
    schedule = processes.directory / "beat-schedule"
    processes.start("beat", [*celery, "beat", "-l", loglevel, "-s", str(schedule), "--pidfile="])
    where: list[tuple[str, Any]] = [("database", _masked(store_url)), ("broker", _masked(broker_url))]
    where += [(name, processes.log_of(name)) for name in ("worker", "beat")]
    if importlib.util.find_spec("flower") is not None:
        processes.start(
            "flower", [*celery, "flower", "--address=127.0.0.1", f"--port={flower_port}", "--read-only=True"]
        )
        where.append(("flower", f"http://127.0.0.1:{flower_port}"))
    environment = processes.directory / "env"
    environment.write_text("".join(f"export {key}={shlex.quote(processes.environment[key])}\n" for key in SHARED))
    where.append(("for other terminals", f". {environment}"))
    await_fact(lambda: b" ready." in ready.read_bytes()[mark:], worker, ready)
    output.show_table("celery-flows dev", ("part", "where"), where)
    click.echo("ready; Ctrl-C ends it")


def _watch(processes: Processes, stopped: threading.Event) -> None:
    while not stopped.wait(0.2):
        for name, code in processes.dead().items():
            raise click.ClickException(f"{name} ended with exit code {code}; see {processes.log_of(name)}")
    click.echo("stopping")


def _python_path() -> str:
    """The current folder is searched for the app, as ``celery`` itself does."""
    return os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))


def _masked(url: str) -> str:
    return str(maybe_sanitize_url(url))
