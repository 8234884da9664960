"""``python -m examples.nightly_report``: three nights, two seconds long each, on servers of their own unless
FLOW_STORE_URL and CELERY_BROKER_URL are set."""

from __future__ import annotations

import os

NIGHTS = 3

os.environ.setdefault("NIGHTLY_REPORT_SECONDS", "2")


def main() -> None:
    from celery_flows import Flow, FlowStatus
    from celery_flows.worker.embedded import await_fact
    from examples.nightly_report.app import app, flows
    from examples.servers import servers, start_worker

    with servers(app) as processes:
        beat = ("--beat", "--schedule", str(processes.directory / "beat"))
        start_worker(processes, "examples.nightly_report.app", *beat)

        def ended() -> list[Flow]:
            return flows.store.list_by_status(FlowStatus.FINISHED)

        await_fact(lambda: len(ended()) >= NIGHTS, processes.children["worker"], processes.log_of("worker"), 60)
        reports = sorted(ended(), key=lambda flow: str(flow.idempotency_key))[:NIGHTS]
        for report in reports:
            print(f"{report.idempotency_key}: {report.result_json}")


if __name__ == "__main__":
    main()
