"""``python -m examples.nightly_report``: three nights, two seconds long each, on servers of their own unless
FLOW_STORE_URL and CELERY_BROKER_URL are set."""

from __future__ import annotations

import os

from celery_flows import Flow, FlowStatus
from celery_flows.worker.embedded import await_fact
from examples.nightly_report.app import app, flows
from examples.servers import servers, start_worker

NIGHTS, SECONDS = 3, "2"


def main() -> None:
    os.environ.setdefault("NIGHTLY_REPORT_SECONDS", SECONDS)  # for the worker
    with servers(app) as processes:
        beat = ("--beat", "--schedule", str(processes.directory / "beat"))
        start_worker(processes, "examples.nightly_report.app", *beat)
        await_fact(lambda: len(reports()) >= NIGHTS, processes.children["worker"], processes.log_of("worker"))
        for report in reports()[:NIGHTS]:
            print(report.result_json)


def reports() -> list[Flow]:
    """The flows that have ended, oldest slot first."""
    ended = flows.store.list_by_status(FlowStatus.FINISHED)
    return sorted(ended, key=lambda flow: str(flow.idempotency_key))


if __name__ == "__main__":
    main()
