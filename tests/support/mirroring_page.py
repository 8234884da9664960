"""Runs the Python blocks of docs/guide/mirroring.md one by one, in a process of its own; takes a database's URL.

The tasks of the page's app are shared, as by default, with every other app that is made in the process.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celery_flows import SqlFlowStore
from celery_flows.tasks.observer import observed
from tests.support.consumer import Consumer

PAGE = Path(__file__).parents[2] / "docs/guide/mirroring.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
QUEUE = "page"


@contextmanager
def working(consumer: Consumer) -> Iterator[None]:
    """A worker's hands, meanwhile."""
    stopped = threading.Event()

    def work() -> None:
        while not stopped.wait(0.01):
            consumer.run_all()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def main(database_url: str) -> dict[str, Any]:
    """What came of each block."""
    shop, canvas, rule = BLOCKS
    names: dict[str, Any] = {"__name__": "shop"}
    exec(shop, names)
    app, flows = names["app"], names["flows"]
    app.conf.update(
        broker_url="memory://", result_backend="cache+memory://", task_default_queue=QUEUE, flow_store_url=database_url
    )
    SqlFlowStore.open(database_url).close()
    said: dict[str, Any] = {}
    with observed(flows.runtime), working(Consumer(app, QUEUE)):
        exec(canvas, names)
        said["sum"] = names["result"].get(timeout=30)
        said["canvas"] = _said(flows, names["flow"])
        exec(rule, names)
        names["sent"].get(timeout=30)
        names["flow"].result(timeout=30)
        said["rule"] = _said(flows, names["flow"])
    flows.store.close()
    return said


def _said(flows: Any, flow: Any) -> list[str]:
    steps = [f"{step.task} {step.status}" for step in flows.store.list_steps(flow.id)]
    return [f"{flow.get().goal}: {flow.status()}", *steps]


if __name__ == "__main__":
    json.dump(main(sys.argv[1]), sys.stdout)
