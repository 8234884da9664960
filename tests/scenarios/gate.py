"""Where a scenario's step is held, so that its worker can be killed just there."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.support.effects import EffectLog

GATE = "SCENARIO_GATE"  # a folder; not there: nothing is held
HOLD_SECONDS = 60.0


def pass_gate(name: str) -> None:
    """Notes that a step has come here, and waits, if it is the first to, until it is killed or the gate is opened."""
    if GATE not in os.environ:
        return
    folder = Path(os.environ[GATE])
    log = EffectLog(folder / "log.jsonl")
    log.append(name)
    deadline = time.monotonic() + HOLD_SECONDS
    while len(log.read(name)) == 1 and not (folder / "open").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
