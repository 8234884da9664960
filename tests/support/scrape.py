"""Asking a worker over HTTP what it has counted."""

from __future__ import annotations

import re
from collections import defaultdict
from urllib.error import HTTPError
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from tests.support.waiting import until
from tests.support.workers import Worker

PORT = "FLOW_METRICS_PORT"
ANY = "0"  # the worker's log says which it has
COUNTED_SECONDS = 30.0


class Scraped:
    """What /metrics said."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self._samples: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
        for family in self.families.values():
            for sample in family.samples:
                self._samples[sample.name].append((sample.labels, sample.value))

    @property
    def names(self) -> set[str]:
        """Of the samples."""
        return set(self._samples)

    def labels(self, name: str) -> set[str]:
        return {label for labels, _ in self._samples[name] for label in labels}

    def value(self, name: str, **labels: str) -> float:
        """The sum of all samples with these labels; 0 if there is none."""
        found = self._samples.get(f"celery_flows_{name}", [])
        return sum(value for given, value in found if labels.items() <= given.items())


def url_of(worker: Worker) -> str:
    """Where a worker answers."""
    pattern = r"metrics are at (http://\S+)/metrics"
    until(lambda: re.search(pattern, worker.output), f"{worker.name} says where its metrics are", within_seconds=30)
    found = re.search(pattern, worker.output)
    assert found is not None
    return found[1]


def ask(worker: Worker, path: str) -> tuple[int, str]:
    """What a worker answers: status and body."""
    try:
        with urlopen(url_of(worker) + path, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def scrape(worker: Worker) -> Scraped:
    status, text = ask(worker, "/metrics")
    assert status == 200, text
    return Scraped(text)


def await_value(worker: Worker, wanted: float, name: str, **labels: str) -> None:
    """Waits until a worker has counted so much."""
    until(
        lambda: scrape(worker).value(name, **labels) == wanted, f"{name} {labels} is {wanted}",
        within_seconds=COUNTED_SECONDS,
    )  # fmt: skip
