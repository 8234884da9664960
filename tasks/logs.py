"""Log lines that say which flow and step they come from, whoever writes them.

For an application that sets up its own logging: a filter for its handlers (:class:`FlowContext`), or a processor for
structlog (:func:`add_flow_context`). :func:`use_flow_logging` does all of it, and is what ``celery_flows.worker`` calls
for itself; nobody else's logging is touched.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from functools import partial
from typing import Any

import structlog
from celery import Celery
from celery.app.log import Logging

from celery_flows.store import InvalidData
from celery_flows.tasks.bound import NAMES, at_work
from celery_flows.tasks.settings import LogFormat, load_settings


class FlowContext(logging.Filter):
    """Gives each record ``flow``, ``flow_id``, ``step``, ``run_id`` and ``attempt``: of what is at work where it was
    logged, and empty outside of flows. Add it to handlers: loggers do not filter what comes from below them."""

    def filter(self, record: logging.LogRecord) -> bool:
        bound = at_work()
        for name in NAMES:
            if not hasattr(record, name):
                setattr(record, name, bound.get(name, ""))
        return True


def add_flow_context(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: adds what :class:`FlowContext` does, of what there is."""
    for name, value in at_work().items():
        event.setdefault(name, value)
    return event


def use_flow_logging(app: Celery, format: LogFormat | None = None) -> None:
    """Has the programs of this app (worker, beat) write each line with flow and step in it, to where Celery writes its
    log. Call it where the app is made.

    Args:
        format: "console" or "json", an object a line; None: as ``flow_log_format`` says.
    """
    app.log_cls = type("FlowLogging", (FlowLogging,), {"log_format": format})  # type: ignore[assignment]
    app.__dict__.pop("log", None)


class FlowLogging(Logging):
    """Celery's setup of its log, with formatters of ours."""

    log_format: LogFormat | None = None

    def setup_handlers(
        self, logger: Any, logfile: Any, format: Any, colorize: Any, formatter: Any = None, **options: Any
    ) -> Any:
        return super().setup_handlers(logger, logfile, format, colorize, partial(_formatter, self._chosen()), **options)

    def _chosen(self) -> LogFormat:
        if self.log_format is not None:
            return self.log_format
        try:
            return load_settings(self.app.conf).log_format
        except InvalidData:  # the program refuses to start for that, and says so better
            return "console"


def _formatter(log_format: LogFormat, _: Any, datefmt: Any = None, use_color: bool | None = None) -> logging.Formatter:
    # Extras stay out of it: Celery gives its lines the arguments of tasks that way.
    shared: list[Any] = [
        add_flow_context,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.CallsiteParameterAdder({structlog.processors.CallsiteParameter.PROCESS_NAME}),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: Any = structlog.dev.ConsoleRenderer(colors=bool(use_color), pad_event_to=0)
    if log_format == "json":
        shared.append(structlog.processors.format_exc_info)
        renderer = structlog.processors.JSONRenderer(default=str)
    meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    return structlog.stdlib.ProcessorFormatter(processors=[meta, renderer], foreign_pre_chain=shared)
