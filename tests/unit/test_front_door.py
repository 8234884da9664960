"""The front door: what it offers, and that nobody who only imports it pays for it or is changed by it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import celery_flows
from tests.support.commandline import environment

PUBLIC = [
    "AlreadyTerminal",
    "Approval",
    "AsyncRun",
    "CancelPending",
    "Decision",
    "DuplicateFlow",
    "DuplicateStep",
    "Event",
    "First",
    "Flow",
    "FlowCancelled",
    "FlowDefinition",
    "FlowError",
    "FlowEvent",
    "FlowFailed",
    "FlowHandle",
    "FlowManager",
    "FlowNotFound",
    "FlowSettings",
    "FlowStatus",
    "FlowStep",
    "FlowStepStatus",
    "FlowStore",
    "FlowTimedOut",
    "Flows",
    "HistoryMismatch",
    "IllegalTransition",
    "InvalidData",
    "JsonLinesFile",
    "KeyConflict",
    "Limit",
    "Permanent",
    "ResultTimedOut",
    "Retry",
    "RevisionMismatch",
    "Run",
    "SchemaOutdated",
    "SqlFlowStore",
    "StartPending",
    "StepFailed",
    "StepLost",
    "StepTimedOut",
    "StoreError",
    "Timer",
    "UnknownFlow",
    "WaitTimedOut",
    "step",
]

# Opening for writing, and whatever else leaves this process, is noted by the interpreter itself.
WATCH = """
import json, os, sys
seen = []

def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "sqlite3.connect", "subprocess.Popen", "os.fork", "os.mkdir"):
        seen.append(event)
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        seen.append(f"open {arguments[0]}")

sys.dont_write_bytecode = True
sys.addaudithook(watch)
import MODULE
import threading
from celery import _state

json.dump({
    "opened": seen,
    "threads": threading.active_count(),
    "apps": len(_state._apps),
    "current": _state._tls.current_app is not None,
    "default": _state.default_app is not None,
}, sys.stdout)
"""


def test_the_public_names_are_these() -> None:
    assert celery_flows.__all__ == PUBLIC


MODULES = ["celery_flows", "celery_flows.testing", "celery_flows.worker", "celery_flows.worker.cli"]


@pytest.mark.parametrize("module", MODULES)
def test_importing_makes_no_app_and_opens_nothing(module: str) -> None:
    script = WATCH.replace("MODULE", module)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], env=environment(), capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout) == {"opened": [], "threads": 1, "apps": 0, "current": False, "default": False}
