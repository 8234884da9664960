"""For log lines that say which flow and step they come from; see docs/observability.md."""

from __future__ import annotations

from celery_flows.tasks.logs import FlowContext, add_flow_context, use_flow_logging

__all__ = ["FlowContext", "add_flow_context", "use_flow_logging"]
