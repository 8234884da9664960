"""The settings as they are in force, and where each was set. What may be secret in them is masked."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from kombu.utils.url import maybe_sanitize_url

from celery_flows.tasks.settings import ENV_PREFIX
from celery_flows.worker import output
from celery_flows.worker.flows import Flows


class Setting(NamedTuple):
    """A setting that is in force."""

    value: Any
    source: str  # environment, application, default


def effective(flows: Flows) -> dict[str, Setting]:
    """All of ours, by the name that they have on the app, and Celery's broker."""
    told = {}
    for name, value in flows.settings.model_dump(mode="json").items():
        shown = output.masked(value) if name == "store_url" and value is not None else value
        told[f"flow_{name}"] = Setting(shown, _source(flows, name))
    broker: Any = flows.app.conf.broker_url
    in_shell = "CELERY_BROKER_URL" in os.environ
    source = "environment" if in_shell else "application" if broker is not None else "default"
    told["broker_url"] = Setting(None if broker is None else maybe_sanitize_url(str(broker)), source)
    return told


def _source(flows: Flows, name: str) -> str:
    if f"{ENV_PREFIX}{name}".lower() in (key.lower() for key in os.environ):
        return "environment"
    return "application" if flows.app.conf.get(f"flow_{name}") is not None else "default"
