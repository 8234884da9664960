"""Assembly and operation. ``celery -A celery_flows.worker worker|beat|flower|flow`` runs the app in ``app.py``."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    # Made only when asked for: importing the CLI in somebody's project must not make a second Celery app.
    if name in ("app", "celery", "flows"):
        module = import_module("celery_flows.worker.app")
        globals().update(app=module.app, celery=module.app, flows=module.flows)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
