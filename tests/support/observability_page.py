"""Runs the code of docs/observability.md as one program, then a flow, and prints what was traced and logged.

A process of its own: a tracer provider can be set only once, and structlog is the process's.
"""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import Any

import structlog
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from celery_flows import Run
from tests.support.bench import Bench
from tests.support.commandline import ROOT

PAGE = ROOT / "docs/observability.md"


def main(url: str) -> None:
    with closing(Bench(url)) as bench:
        names: dict[str, Any] = {"app": bench.app, "exporter": InMemorySpanExporter(), "stream": io.StringIO()}
        for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
            exec(compile(block, str(PAGE), "exec"), names)
        log, structured = logging.getLogger("shop"), io.StringIO()

        def charge() -> None:
            log.warning("charged")
            structlog.get_logger().warning("charged")

        @bench.flows.flow("shop/order")
        def order(run: Run) -> None:
            run.step(charge)

        with redirect_stdout(structured):
            bench.finish(handle := order.start())
        told = names["stream"].getvalue().strip(), json.loads(structured.getvalue())
        formatter = _formatter(bench)
        flow_id = str(handle.id)
        spans = names["exporter"].get_finished_spans()
        line = formatter.format(logging.makeLogRecord({"msg": "hello", "levelname": "INFO"}))
        seen = {
            "spans": sorted(span.name for span in spans),
            "traces": len({span.context.trace_id for span in spans}),
            "filter": told[0].replace(flow_id, "FLOW_ID"),
            "processor": [told[1]["event"], told[1]["step"], told[1]["flow_id"] == flow_id],
            "json": json.loads(line)["event"],
        }
        sys.stdout.write(json.dumps(seen) + "\n")


def _formatter(bench: Bench) -> logging.Formatter:
    """What Celery would give the handlers of this app's log."""
    logger = logging.Logger("worker")
    bench.app.log.setup_handlers(logger, io.StringIO(), "%(message)s", False)
    formatter = logger.handlers[0].formatter
    assert formatter is not None
    return formatter


if __name__ == "__main__":
    assert Path.cwd() == ROOT
    main(sys.argv[1])
