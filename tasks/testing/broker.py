"""The application without its broker: what it sends of its own goes into memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery

from celery_flows.tasks.testing.replaced import asked_anew, replaced

_KEYS = ("broker_url", "broker_read_url", "broker_write_url")  # the environment's beat those of the app


@contextmanager
def in_memory(app: Celery) -> Iterator[None]:
    """Has the app use kombu's broker in memory, and forget the connections it has, until the end."""
    list(app.conf)  # has Celery read its configuration
    changes: dict[str, Any] = vars(app.conf)["changes"]
    before = dict(changes)
    variables = {name: os.environ.pop(name) for key in _KEYS if (name := f"CELERY_{key.upper()}") in os.environ}
    changes.update(dict.fromkeys(_KEYS, "memory://localhost//"))
    try:
        with replaced(app, _pool=None), asked_anew(app, "amqp"):  # which keeps producers, queues and routes
            yield
            app.control.purge()  # what was sent and not consumed is not for the next test
    finally:
        changes.clear()
        changes.update(before)
        os.environ.update(variables)
