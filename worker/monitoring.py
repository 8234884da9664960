"""Metrics of a worker, if it is to have any."""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING

from celery_flows.store import InvalidData
from celery_flows.tasks.runtime import Runtime

if TYPE_CHECKING:
    from celery_flows.worker.endpoint import Endpoint


def open_endpoint(runtime: Runtime) -> Endpoint | None:
    """Has all processes of this worker count, and gives what answers for them; None: ``flow_metrics_port`` is not set.
    To be called in the worker's main process, before its pool forks.

    Raises:
        InvalidData: prometheus-client is not installed, the port is taken; or ``flow_tracing`` lacks its package.
    """
    _ = runtime.watch.spans  # says now, not with the first flow, that its package is missing
    port = runtime.settings.metrics_port
    if port is None:
        return None
    try:
        from celery_flows.worker.endpoint import Endpoint
        from celery_flows.worker.tallies import Tallies
    except ImportError:
        told = "is set, and prometheus-client is not installed: pip install 'celery-flows[metrics]'"
        raise InvalidData("flow_metrics_port", told) from None
    tallies = Tallies()
    atexit.register(tallies.close)  # however the worker ends, but for kill -9
    endpoint = Endpoint(runtime, tallies, port)
    runtime.watch.meter = tallies
    return endpoint
