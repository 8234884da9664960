"""Store → broker: messages are hints, so sending one may fail; the sweep sends it again."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any
from uuid import UUID

from celery import Celery
from kombu import Connection
from kombu.exceptions import KombuError
from kombu.pools import producers

from celery_flows.store.dispatch import Hint
from celery_flows.tasks.metrics import MESSAGES
from celery_flows.tasks.settings import FlowSettings
from celery_flows.tasks.watch import Watch

log = logging.getLogger("celery_flows.publish")

DRIVE_TASK, STEP_TASK = "flows.drive", "flows.step"


class Publisher:
    """Sends hints over a connection of its own, on which everything is bounded: a dead broker costs a moment."""

    def __init__(self, app: Celery, settings: FlowSettings, watch: Watch | None = None) -> None:
        self._app, self._watch = app, watch or Watch()
        self._timeout = settings.publish_timeout_seconds

    def publish(self, *hints: Hint, within_seconds: float = math.inf) -> int:
        """Sends the hints, the most urgent first, until the broker fails or the time is over; says how many were sent.
        Never raises."""
        if not hints:
            return 0
        with self._watch.spans.publishing():
            sent = self._publish(hints, within_seconds)
        self._watch.meter.add(MESSAGES, ("published",), sent)
        self._watch.meter.add(MESSAGES, ("left",), len(hints) - sent)
        return sent

    def _publish(self, hints: Sequence[Hint], within_seconds: float) -> int:
        sent = 0
        deadline = time.monotonic() + within_seconds
        connection = self._connection
        broken = (*connection.connection_errors, *connection.channel_errors, KombuError, OSError)
        try:
            with producers[connection].acquire(block=True, timeout=self._timeout) as producer:
                for hint in sorted(hints, key=self._urgency):
                    if sent and time.monotonic() > deadline:
                        break
                    sent += self._try_to_send(producer, hint, broken)
        except Exception as error:
            log.warning(
                "the broker took %d of %d messages (%s); the sweep sends the others later",
                sent, len(hints), type(error).__name__,
            )  # fmt: skip
        return sent

    def _urgency(self, hint: Hint) -> tuple[int, UUID]:
        """What is equal goes by age: ids are in the order of creation."""
        return (urgency(self._scheme, hint.priority), hint.flow_id)

    def _try_to_send(self, producer: Any, hint: Hint, broken: tuple[type[BaseException], ...]) -> bool:
        try:
            self._send(producer, hint)
        except broken:
            raise
        except Exception as error:  # this message cannot be sent; it must not keep those behind it from being
            log.error("the message for %s %s cannot be sent (%s)", hint.kind, hint.run_id, type(error).__name__)
            return False
        return True

    def _send(self, producer: Any, hint: Hint) -> None:
        arguments = {"flow_id": str(hint.flow_id)}
        if hint.kind == "step":
            arguments["run_id"] = hint.run_id
        self._app.send_task(
            STEP_TASK if hint.kind == "step" else DRIVE_TASK,
            kwargs=arguments,
            task_id=hint.run_id,
            root_id=str(hint.flow_id),
            parent_id=None if hint.kind == "drive" else str(hint.flow_id),
            shadow=hint.task,
            queue=hint.queue or self._app.conf.task_default_queue,
            priority=hint.priority,
            producer=producer,
            serializer="json",
            ignore_result=True,
            retry=True,
            retry_policy=_ONE_RETRY,
            **(hint.options or {}),
        )

    def connect(self) -> Connection:
        """A connection of one's own, as bounded; to be closed."""
        return self._connection.clone()

    @cached_property
    def _connection(self) -> Connection:
        """Never connected itself: the pool is found by it, and clones it."""
        return self._app.connection_for_write(
            connect_timeout=self._timeout, transport_options=self._transport_options(), heartbeat=0
        )

    @cached_property
    def _scheme(self) -> str:
        return broker_scheme(self._app)

    def _transport_options(self) -> dict[str, Any]:
        if self._scheme in _REDIS:
            return {**_ONE_RETRY, "socket_timeout": self._timeout, "socket_connect_timeout": self._timeout}
        if self._scheme in ("amqp", "amqps", "pyamqp"):
            # Without confirms a refused message is dropped in silence; then only the sweep would notice.
            bounds = {"read_timeout": self._timeout, "write_timeout": self._timeout}
            return {**_ONE_RETRY, **bounds, "confirm_publish": True}
        return {}


def broker_scheme(app: Celery) -> str:
    """What kind of broker the app publishes to: the beginning of its URL."""
    return str(app.conf.broker_write_url or "").partition(":")[0].partition("+")[0]


def urgency(scheme: str, priority: int | None) -> int:
    """Lower comes first. As the broker has it: RabbitMQ delivers high numbers first, Redis low ones; without a priority
    it is 0 to both."""
    number = priority or 0
    return number if scheme in _REDIS else -number


_REDIS = ("redis", "rediss", "sentinel")
_ONE_RETRY = {"max_retries": 1, "interval_start": 0, "interval_step": 0.1, "interval_max": 0.2}
