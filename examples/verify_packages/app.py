"""The Celery app and its flow: list the distributions, check each as a Celery step, join, report."""

from __future__ import annotations

import json
import os
from pathlib import Path

from celery import Celery
from pydantic import BaseModel

from celery_flows import Flows, Run
from examples.verify_packages import audit
from examples.verify_packages.audit import Report

app = Celery("verify_packages")
app.conf.update(task_default_queue="verify-packages", worker_prefetch_multiplier=1)
flows = Flows(app)

EFFECT_LOG = "VERIFY_PACKAGES_EFFECT_LOG"


class Request(BaseModel):
    """What to audit."""

    folder: str


def list_distributions(folder: str) -> list[str]:
    """The names of what is installed there."""
    return sorted(audit.find_distributions(Path(folder)))


@app.task
def check_distribution(folder: str, name: str) -> audit.Checked:
    """Checks every file of one distribution against its RECORD."""
    note_effect(name)
    return audit.check(Path(folder), audit.find_distribution(Path(folder), name))


def find_unlisted(folder: str) -> list[str]:
    """The files that belong to no distribution."""
    return audit.unlisted(Path(folder))


@flows.flow("verify-packages")
def verify_packages(run: Run, request: Request) -> Report:
    """Audits one folder of installed packages."""
    names = run.step(list_distributions, request.folder)
    checked = run.gather(check_distribution.s(request.folder, name) for name in names)
    extra = run.step(find_unlisted, request.folder)
    return Report(
        folder=request.folder,
        distributions=len(checked),
        files=sum(each["files"] for each in checked),
        bytes=sum(each["bytes"] for each in checked),
        altered=[path for each in checked for path in each["altered"]],
        missing=[path for each in checked for path in each["missing"]],
        unlisted=extra,
    )


def note_effect(name: str) -> None:
    """Appends a line that this step's body has run, outside the store: what it claims can be held against this."""
    if log := os.environ.get(EFFECT_LOG):
        line = json.dumps({"name": name, "pid": os.getpid()}) + "\n"
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
