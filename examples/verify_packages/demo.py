"""The demo: an audit on two workers, one of which is killed in the middle."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from celery_flows import FlowHandle, FlowStatus, FlowStepStatus, SqlFlowStore
from celery_flows.store.operations import count_steps
from celery_flows.worker.embedded import Processes, await_fact, start_broker
from examples.verify_packages import proof
from examples.verify_packages.app import EFFECT_LOG, Report, Request, app, flows, verify_packages
from examples.verify_packages.display import console, milestones, show_history, show_report

DEADLINE_SECONDS = 300.0
LEASE_SECONDS = "3"  # the default is 30; a demo is watched
WORKERS = ("worker-1", "worker-2")


def run_demo(folder: Path, report_file: Path, kill: bool) -> int:
    """Runs the audit, kills a worker if asked to, and proves that nothing was lost. Gives the exit code."""
    with tempfile.TemporaryDirectory(prefix="celery-flows-") as scratch, Processes(Path(scratch)) as processes:
        effects = Path(scratch) / "effects.jsonl"
        effects.touch()
        _start_servers(processes, effects)
        for name in WORKERS:
            _start_worker(processes, name)
        handle = verify_packages.start(Request(folder=str(folder)), goal="the installed files are what they should be")
        console.print(f"flow {handle.id} audits {folder}")
        killed = _follow(handle, (lambda: _kill_worker(processes)) if kill else None)
        return _conclude(handle, report_file, effects, killed or not kill)


def _start_servers(processes: Processes, effects: Path) -> None:
    store_url = os.environ.setdefault("FLOW_STORE_URL", f"sqlite:///{processes.directory / 'flows.db'}")
    os.environ.setdefault("FLOW_LEASE_SECONDS", LEASE_SECONDS)
    os.environ["CELERY_BROKER_URL"] = start_broker(processes)
    os.environ[EFFECT_LOG] = str(effects)
    SqlFlowStore.open(store_url).close()
    console.print(f"database {flows.store.engine.url!r}, broker {app.connection_for_write().as_uri()}")


def _start_worker(processes: Processes, name: str) -> None:
    command = [sys.executable, "-m", "celery", "-A", "examples.verify_packages.app", "worker"]
    child = processes.start(name, [*command, "-n", f"{name}@%h", "-c", "1", "-l", "info", "--without-gossip"])
    await_fact(lambda: b" ready." in processes.log_of(name).read_bytes(), child, processes.log_of(name))


def _kill_worker(processes: Processes) -> None:
    """SIGKILL for one worker, parent and children at once: nothing of it can say goodbye."""
    victim = processes.children[WORKERS[0]]
    os.killpg(victim.pid, signal.SIGKILL)
    code = victim.wait()
    console.print(f"[red]killed {WORKERS[0]} (pid {victim.pid}) with SIGKILL, exit code {code}[/red]")
    console.print(f"what it had in hand goes on when its lease of {flows.settings.lease_seconds:g} s ends")


def _follow(handle: FlowHandle[Report], kill: Callable[[], None] | None) -> bool:
    """Shows the flow's progress as the store tells it, and strikes when a third of the steps are done."""
    struck = False
    deadline = time.monotonic() + DEADLINE_SECONDS
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=False, disable=not console.is_terminal) as progress:
        bar = progress.add_task("checking", total=None)
        told = 0
        while not handle.status().is_terminal and time.monotonic() < deadline:
            counts = flows.store.run(count_steps, handle.id)
            done, total = counts.get(FlowStepStatus.SUCCEEDED, 0), sum(counts.values())
            progress.update(bar, completed=done, total=total or None)
            if total > 2:
                reached = sum(done >= milestone for milestone in milestones(total))
                if reached > told and not console.is_terminal:
                    console.print(f"{done} of {total} steps done")
                told = max(told, reached)
                if kill is not None and not struck and done * 3 >= total:
                    kill()
                    struck = True
            time.sleep(0.05)
    return struck


def _conclude(handle: FlowHandle[Report], report_file: Path, effects: Path, struck: bool) -> int:
    flow = handle.get()
    events = flows.store.list_events(handle.id, None)[::-1]
    if flow.status is not FlowStatus.FINISHED:
        show_history(events)
        console.print(f"[red]{flow.status}[/red] {flow.error_json or 'within the time given'}")
        return 1
    report = handle.result()
    report_file.write_text(report.model_dump_json(indent=2) + "\n")
    show_report(report)
    show_history(events)
    wrong = proof.findings(report, flows.store.list_steps(handle.id), events, effects)
    wrong += [] if struck else ["no worker was killed: the flow ended too soon"]
    for finding in wrong:
        console.print(f"[red]does not add up: {finding}[/red]")
    reclaimed = sum(event.kind == "step_started" for event in events) - report.distributions
    console.print(f"report: {report_file}")
    if not wrong:
        console.print(f"steps begun again because their worker died: {reclaimed}; recorded steps that ran again: 0")
    console.print(flow.status.value)
    return 1 if wrong else 0
