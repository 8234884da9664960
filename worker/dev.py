"""``celery-flows dev``: store, broker, worker, beat and Flower in one command, taken down together."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from kombu.utils.url import maybe_sanitize_url

from celery_flows.store import FlowError, SqlFlowStore
from celery_flows.worker import output
from celery_flows.worker.embedded import Processes, await_fact, last_words, start_broker

SHARED = ("FLOW_STORE_URL", "CELERY_BROKER_URL")  # what another terminal needs to talk to the same flows


@click.command()
@click.option("-A", "--app", default="celery_flows.worker", show_default=True, help="The Celery app with your flows.")
@click.option(
    "--directory", type=click.Path(path_type=Path, file_okay=False), default=Path(".celery-flows"), show_default=True,
    help="Where the embedded database, the broker's files and the logs go.",
)  # fmt: skip
@click.option("-c", "--concurrency", type=click.IntRange(1, 64), default=2, show_default=True, help="Worker processes.")
@click.option(
    "--flower-port",
    type=click.IntRange(1, 65_535),
    default=5555,
    show_default=True,
    help="Where Flower listens, on 127.0.0.1 only.",
)
@click.option(
    "-l", "--loglevel", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True,
    help="How much worker and beat write to their logs.",
)  # fmt: skip
def dev(app: str, directory: Path, concurrency: int, flower_port: int, loglevel: str) -> None:
    """Runs everything here: SQLite, a Redis of its own, worker, beat, and Flower if it is installed.

    What is configured is used instead: FLOW_STORE_URL for the database, CELERY_BROKER_URL for the broker. Ends on
    Ctrl-C or SIGTERM, and takes all of it down; work in hand has some seconds to end, a second Ctrl-C gives it none.
    """
    try:
        with _alone_in(directory) as lock, Processes(directory, shared_files=(lock,)) as processes:
            stopped = _stop_on_signals(processes)
            _start(processes, stopped, app, concurrency, flower_port, loglevel)
            _watch(processes, stopped)
    except FlowError as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def _alone_in(directory: Path) -> Iterator[int]:
    """Holds the folder: two runs would share its socket and its logs. Gives the lock, for the children to hold as well:
    should this process be killed, a server that is still ending would take the next one's socket away."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "dev.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise click.ClickException(
                f"celery-flows dev is running in {directory} already (process {lock.read() or '?'}): "
                "end that one, or choose another --directory"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield lock.fileno()


def _stop_on_signals(processes: Processes) -> threading.Event:
    stopped = threading.Event()

    def stop(*_: object) -> None:
        if stopped.is_set():
            processes.kill()
        stopped.set()

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, stop)
    return stopped


def _start(
    processes: Processes, stopped: threading.Event, app: str, concurrency: int, flower_port: int, loglevel: str
) -> None:
    has_flower = importlib.util.find_spec("flower") is not None
    if has_flower and _is_listening(flower_port):
        raise click.ClickException(f"port {flower_port}, for Flower, is in use: choose another --flower-port")
    store_url = os.environ.get("FLOW_STORE_URL") or f"sqlite:///{processes.directory.resolve() / 'flows.db'}"
    SqlFlowStore.open(store_url).close()
    broker_url = start_broker(processes)
    processes.environment = {"FLOW_STORE_URL": store_url, "CELERY_BROKER_URL": broker_url, "PYTHONPATH": _python_path()}
    celery = [sys.executable, "-m", "celery", "-A", app]
    is_ready = _says_ready(processes.log_of("worker"))
    processes.start("worker", [*celery, "worker", "-E", "-c", str(concurrency), "-l", loglevel])
    schedule = processes.directory / "beat-schedule"
    processes.start("beat", [*celery, "beat", "-l", loglevel, "-s", str(schedule), "--pidfile="])
    if has_flower:
        processes.start(
            "flower", [*celery, "flower", "--address=127.0.0.1", f"--port={flower_port}", "--read-only=True"]
        )
    _await(processes, "worker", is_ready, stopped)
    if has_flower:
        _await(processes, "flower", lambda: _is_listening(flower_port), stopped)
    if not stopped.is_set():
        _show(processes, store_url, broker_url, flower_port if has_flower else None)


def _says_ready(log: Path) -> Callable[[], bool]:
    """Whether the worker has said so since now: the log may hold what earlier ones said."""
    began = log.stat().st_size if log.exists() else 0
    return lambda: b" ready." in log.read_bytes()[began:]


def _await(processes: Processes, name: str, fact: Callable[[], bool], stopped: threading.Event) -> None:
    await_fact(lambda: stopped.is_set() or fact(), processes.children[name], processes.log_of(name))


def _is_listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _show(processes: Processes, store_url: str, broker_url: str, flower_port: int | None) -> None:
    """Says where everything is, here and in a file for other terminals."""
    environment = processes.directory / "env"
    environment.touch(mode=0o600)  # a URL may hold a password
    environment.write_text("".join(f"export {key}={shlex.quote(processes.environment[key])}\n" for key in SHARED))
    where: list[tuple[str, Any]] = [("database", output.masked(store_url)), ("broker", maybe_sanitize_url(broker_url))]
    where += [(name, processes.log_of(name)) for name in ("worker", "beat")]
    if flower_port is not None:
        where.append(("flower", f"http://127.0.0.1:{flower_port}"))
    where.append(("for other terminals", f". {environment}"))
    output.show_table("celery-flows dev", ("part", "where"), where)
    click.echo("ready; Ctrl-C ends it")


def _watch(processes: Processes, stopped: threading.Event) -> None:
    while not stopped.wait(0.2):
        for name, code in processes.dead().items():
            log = processes.log_of(name)
            raise click.ClickException(f"{name} ended with exit code {code}; see {log}{last_words(log)}")
    click.echo("stopping")


def _python_path() -> str:
    """The current folder is searched for the app, as ``celery`` itself does."""
    return os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
