"""Counts of many processes come to their sum, whatever becomes of the processes; and counting never stops work."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from celery_flows.tasks import metrics
from celery_flows.tasks.metrics import Metric
from celery_flows.worker import tallies as module
from celery_flows.worker.kept import Kept
from celery_flows.worker.tallies import Tallies
from tests.support.scrape import Scraped
from tests.support.waiting import until

COUNTER = Metric("things", "Things.", ("kind",))
TIMES = Metric("took_seconds", "How long.", ("kind",), (0.1, 1.0))


@pytest.fixture
def tallies() -> Iterator[Tallies]:
    with closing(Tallies()) as made:
        yield made


def told(tallies: Tallies) -> Scraped:
    registry = CollectorRegistry()
    registry.register(tallies)
    return Scraped(generate_latest(registry).decode())


def in_child(tallies: Tallies, *kinds: str) -> None:
    """A forked process counts, and ends without a word."""
    child = os.fork()
    if child == 0:
        for kind in kinds:
            tallies.add(COUNTER, (kind,))
            tallies.observe(TIMES, 0.5, (kind,))
        os._exit(0)
    os.waitpid(child, 0)


def test_what_children_counted_is_added_to_what_their_parent_did(tallies: Tallies) -> None:
    tallies.add(COUNTER, ("a",), 2)
    tallies.observe(TIMES, 0.05, ("a",))
    for _ in range(3):
        in_child(tallies, "a", "b")

    for _ in range(2):  # asked twice it is the same
        found = told(tallies)
        assert found.value("things_total", kind="a") == 5
        assert found.value("things_total", kind="b") == 3
        assert found.value("took_seconds_count", kind="a") == 4
        assert found.value("took_seconds_bucket", kind="a", le="0.1") == 1
        assert found.value("took_seconds_bucket", kind="a", le="1.0") == 4
        assert found.value("took_seconds_sum", kind="a") == pytest.approx(1.55)
    assert {path.stem.partition("_")[2] for path in tallies.directory.iterdir()} == {str(os.getpid())}


def test_a_bound_belongs_to_its_bucket_and_what_is_beyond_all_is_counted(tallies: Tallies) -> None:
    for seconds in (0.1, 1.0, 99.0):
        tallies.observe(TIMES, seconds, ("a",))
    found = told(tallies)
    assert [found.value("took_seconds_bucket", le=le) for le in ("0.1", "1.0", "+Inf")] == [1, 2, 3]


def test_threads_lose_no_count(tallies: Tallies) -> None:
    def count() -> None:
        for _ in range(500):
            tallies.add(COUNTER, ("a",))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told(tallies).value("things_total", kind="a") == 2000


def test_a_fork_while_a_thread_counts_leaves_no_lock_behind(tallies: Tallies) -> None:
    with tallies._lock:  # as another thread has it in that moment
        child = os.fork()
        if child == 0:
            tallies.add(COUNTER, ("a",))
            os._exit(0)
    until(lambda: os.waitpid(child, os.WNOHANG)[0] == child, "the child could count", within_seconds=10)
    assert told(tallies).value("things_total") == 1


def test_too_many_series_are_told_apart_no_more(tallies: Tallies, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SERIES", 3)
    for number in range(10):
        tallies.add(COUNTER, (f"kind {number}",))
    found = told(tallies)
    assert found.value("things_total", kind="(other)") == 7
    assert found.value("things_total") == 10


def test_whoever_counts_is_not_stopped_by_a_folder_that_is_gone(tallies: Tallies) -> None:
    shutil.rmtree(tallies.directory)
    tallies.add(COUNTER, ("a",))
    tallies.observe(TIMES, 1.0, ("a",))
    tallies.close()
    tallies.add(COUNTER, ("a",))


def test_names_and_labels_are_what_prometheus_takes() -> None:
    for metric in metrics.METRICS:
        assert metric.name.replace("_", "").islower()
        assert not metric.name.endswith(("_total", "_sum", "_count", "_bucket"))
        assert not {"flow_id", "id", "run_id", "owner", "key", "worker", "queue"} & set(metric.labels)


def test_an_answer_is_kept_and_asked_for_by_one_at_a_time() -> None:
    asked: list[int] = []
    go_on, begun = threading.Event(), threading.Event()

    def ask() -> int:
        asked.append(len(asked))
        if len(asked) > 1:
            begun.set()
            assert go_on.wait(10)
        return len(asked)

    kept = Kept(ask, 3600.0)
    assert (kept.get(), kept.get()) == (1, 1)
    kept._until = 0.0  # the time is over
    slow = threading.Thread(target=kept.get)
    slow.start()
    assert begun.wait(10)
    assert kept.get() == 1  # the last answer, while another asks
    go_on.set()
    slow.join()
    assert kept.get() == 2


def test_an_answer_that_took_long_is_kept_for_longer() -> None:
    kept = Kept(lambda: until(lambda: True, "now"), 0.0)
    kept.get()
    assert kept._until - kept.took_seconds * Kept.SHARE > 0
