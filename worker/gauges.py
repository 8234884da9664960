"""What stands in the store, for a scrape: open flows, work that waits, leases, queues for slots, heartbeats.

All workers tell the same of it, so take the maximum over them, not the sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

from celery_flows.store import FlowError, counts
from celery_flows.store.counts import Counts
from celery_flows.store.script import Call
from celery_flows.store.tables import DISPATCH_KINDS
from celery_flows.tasks import maintenance
from celery_flows.tasks.metrics import PREFIX
from celery_flows.tasks.runtime import Runtime
from celery_flows.worker.kept import Kept

KEPT_SECONDS = 5.0
CHORES = (maintenance.SWEEP, maintenance.BEAT, maintenance.PRUNE, maintenance.VERIFY)
OTHER = "(other)"  # definitions that this application does not have: their names may be made up as flows are


class Gauges(Collector):
    """Reads the store when it is scraped, at most every few seconds."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._counts = Kept(self._count, KEPT_SECONDS)

    def _count(self) -> Counts | None:
        """None: the database does not answer."""
        settings = self._runtime.settings
        pauses = settings.republish_seconds, settings.republish_max_seconds
        try:
            counted: Counts = self._runtime.store.attempt(Call(counts.count, (*pauses, CHORES)), patience=0.0)
        except FlowError:
            return None
        return counted

    def collect(self) -> Iterator[GaugeMetricFamily]:
        counted = self._counts.get()
        yield _gauge("database_up", "Whether the database answers.", (), {(): float(counted is not None)})
        took = {(): self._counts.took_seconds}
        yield _gauge("count_seconds", "How long counting what stands in the store took, the last time.", (), took)
        if counted is None:
            return
        open_flows: Counter[tuple[str, ...]] = Counter()
        for definition, status, count in counted.open_flows:
            open_flows[self._known(definition), status.value] += count
        yield _gauge("open_flows", "Flows that have not ended, by the store.", ("definition", "status"), open_flows)
        none = dict.fromkeys(((kind,) for kind in DISPATCH_KINDS), 0.0)
        waiting = none | {(each.kind,): float(each.count) for each in counted.waiting}
        yield _gauge("waiting", "Work that is due or published, and that no worker holds.", ("kind",), waiting)
        oldest = none | {(each.kind,): each.oldest_seconds for each in counted.waiting}
        yield _gauge("waiting_oldest_seconds", "How long the oldest of it has waited.", ("kind",), oldest)
        held = none | {(kind,): float(count) for kind, count in counted.held}
        yield _gauge("held", "Work that a worker holds the lease of.", ("kind",), held)
        limited = [each.name for each in self._runtime.registry if each.limit is not None]
        queued: Counter[tuple[str, ...]] = Counter({(name,): 0 for name in limited})
        for definition, count in counted.queued:
            queued[self._known(definition),] += count
        yield _gauge("queued", "Flows that queue for a slot of their limit.", ("definition",), queued)
        silent = {(chore,): seconds for chore, seconds in counted.silent_seconds.items()}
        yield _gauge("heartbeat_age_seconds", "How long ago somebody last did a chore.", ("chore",), silent)

    def _known(self, definition: str) -> str:
        return definition if self._runtime.registry.get(definition) is not None else OTHER


def _gauge(name: str, told: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> GaugeMetricFamily:
    """``values`` by their labels' values."""
    family = GaugeMetricFamily(PREFIX + name, told, labels=labels)
    for given, value in sorted(values.items()):
        family.add_metric(list(given), value)
    return family
