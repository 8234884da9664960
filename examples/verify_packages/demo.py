"""The demo: an audit on two workers, one of which is killed in the middle."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from kombu.utils.url import maybe_sanitize_url
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from celery_flows import FlowHandle, FlowStatus, FlowStepStatus, SqlFlowStore
from celery_flows.store.operations import count_steps
from celery_flows.worker.embedded import Processes, await_fact, start_broker
from examples.verify_packages import audit, proof
from examples.verify_packages.app import EFFECT_LOG, Request, flows, verify_packages
from examples.verify_packages.audit import Report
from examples.verify_packages.display import Milestones, console, say, show_history, show_report

DEADLINE_SECONDS = 300.0
LEASE_SECONDS = "3"  # the default is 30; a demo is watched
WORKERS = ("worker-1", "worker-2")
STEPS_BESIDE = 2  # to list the packages, and to find what belongs to none
LOOK_SECONDS, LOOKS_PER_COUNT = 0.005, 10  # small packages are checked within milliseconds


def run_demo(folder: Path, report_file: Path, kill: bool) -> int:
    """Runs the audit, kills a worker if asked to, and proves that nothing was lost. Gives the exit code."""
    packages = len(audit.find_distributions(folder))
    if not packages:
        raise FileNotFoundError(f"no packages are installed in {folder}")
    with tempfile.TemporaryDirectory(prefix="celery-flows-") as scratch, Processes(Path(scratch)) as processes:
        effects = Path(scratch) / "effects.jsonl"
        effects.touch()
        _start_servers(processes, effects)
        _start_workers(processes)
        handle = verify_packages.start(Request(folder=str(folder)), goal="the installed files are what they should be")
        say(f"flow {handle.id} audits {folder}, {packages} packages")
        striker = Striker(processes, effects, packages) if kill else None
        _follow(handle, striker, total=packages + STEPS_BESIDE)
        return _conclude(handle, report_file, effects, was_killed=striker is None or striker.struck)


def _start_servers(processes: Processes, effects: Path) -> None:
    store_url = os.environ.setdefault("FLOW_STORE_URL", f"sqlite:///{processes.directory / 'flows.db'}")
    os.environ.setdefault("FLOW_LEASE_SECONDS", LEASE_SECONDS)
    os.environ["CELERY_BROKER_URL"] = start_broker(processes)
    os.environ[EFFECT_LOG] = str(effects)
    SqlFlowStore.open(store_url).close()
    say(f"database {flows.store.engine.url!r}, broker {maybe_sanitize_url(os.environ['CELERY_BROKER_URL'])}")


def _start_workers(processes: Processes) -> None:
    command = [sys.executable, "-m", "celery", "-A", "examples.verify_packages.app", "worker"]
    for name in WORKERS:
        processes.start(name, [*command, "-n", f"{name}@%h", "-c", "1", "-l", "info", "--without-gossip"])
    for name in WORKERS:
        log = processes.log_of(name)
        await_fact(lambda log=log: b" ready." in log.read_bytes(), processes.children[name], log)  # type: ignore[misc]
    say(f"{' and '.join(WORKERS)} are ready")


class Striker:
    """Kills the worker that has just begun a check, as soon as a third of them have begun."""

    def __init__(self, processes: Processes, effects: Path, packages: int) -> None:
        self._processes, self._effects, self._packages = processes, effects, packages
        self.struck = False

    def look(self) -> None:
        """Strikes if the time has come."""
        begun = self._effects.read_bytes().splitlines()
        if self.struck or len(begun) * 3 < self._packages:
            return
        last = json.loads(begun[-1])
        victim = self._worker_of(last["pid"])
        if victim is not None:
            self._kill(victim, f"{last['name']}, when {len(begun)} of {self._packages} checks had begun")

    def _worker_of(self, pid: int) -> str | None:
        with suppress(ProcessLookupError):
            session = os.getsid(pid)  # each worker has one of its own
            return next((name for name in WORKERS if self._processes.children[name].pid == session), None)
        return None

    def _kill(self, victim: str, at: str) -> None:
        """SIGKILL for parent and children at once: nothing of it can say goodbye."""
        self._processes.kill(victim)
        code = self._processes.children[victim].wait()
        self.struck = True
        say(f"killed {victim} with SIGKILL at {at}: exit code {code}", "bold red")
        say(f"what it had in hand goes on when its lease of {flows.settings.lease_seconds:g} s ends")


def _follow(handle: FlowHandle[Report], striker: Striker | None, total: int) -> None:
    """Shows the flow's progress, as the store tells it, until it has ended."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    deadline = time.monotonic() + DEADLINE_SECONDS
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        show = _counter(handle, progress, progress.add_task("steps", total=total), total)
        ended = False
        while not ended and time.monotonic() < deadline:
            ended = handle.status().is_terminal
            show()
            for _ in range(LOOKS_PER_COUNT):
                if striker is not None and not ended:
                    striker.look()
                time.sleep(LOOK_SECONDS)


def _counter(handle: FlowHandle[Report], progress: Progress, bar: TaskID, total: int) -> Callable[[], None]:
    milestones = Milestones()

    def show() -> None:
        done = flows.store.run(count_steps, handle.id).get(FlowStepStatus.SUCCEEDED, 0)
        progress.update(bar, completed=done)
        if not console.is_terminal and milestones.reached(done, total):
            say(f"{done} of {total} steps done")

    return show


def _conclude(handle: FlowHandle[Report], report_file: Path, effects: Path, *, was_killed: bool) -> int:
    flow, steps = handle.get(), flows.store.list_steps(handle.id)
    events = flows.store.list_events(handle.id, None)[::-1]
    if flow.status is not FlowStatus.FINISHED:
        show_history(events, proof.names_of(steps))
        say(f"{flow.status}: {flow.error_json or f'not at its end after {DEADLINE_SECONDS:g} s'}", "red")
        return 1
    report = handle.result()
    report_file.write_text(report.model_dump_json(indent=2) + "\n")
    show_history(events, proof.names_of(steps))
    show_report(report)
    say(f"the report as JSON: {report_file}")
    wrong = proof.findings(report, steps, events, effects)
    wrong += [] if was_killed else ["no worker was killed: the flow ended too soon (more packages, or --no-kill)"]
    for finding in wrong:
        say(f"does not add up: {finding}", "red")
    if not wrong:
        again = proof.begun_again(steps, events)
        say("the packages counted again without a flow: the same; recorded steps that ran again: none")
        say(f"steps begun again because their worker died with them in hand: {', '.join(again) or 'none'}")
    say(flow.status.value, "red" if wrong else "bold green")
    return 1 if wrong else 0
