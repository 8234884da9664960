"""What the processes of a worker have counted, added up.

prometheus_client's own multi-process mode is an environment variable that must be set before anybody imports it, and
that changes whatever metrics the application has. So the files are its own, the classes that write them are not: each
process of the worker keeps its counts in files in one folder, and whoever scrapes adds them up. What a process that is
dead has counted is taken over by the worker's own, so that nothing is lost and files do not pile up.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import threading
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from prometheus_client.metrics_core import Metric as Family
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import INF, floatToGoString

from celery_flows.tasks.metrics import PREFIX, Meter, Metric
from celery_flows.worker.processes import is_alive

MOST_SERIES = 10_000  # of one process: beyond that labels are not told apart any more
OTHER = "(other)"
FILE_BYTES = 1 << 20  # some thousand series


class Tallies(Meter, Collector):
    """Counts in files, one a kind and a process; made by a worker's main process before its pool forks."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="celery-flows-metrics-"))
        self._owner = os.getpid()
        self._files: dict[str, MmapedDict] = {}
        self._begin()
        refer = weakref.WeakMethod(self._begin)
        os.register_at_fork(after_in_child=lambda: (begin := refer()) and begin())

    def _begin(self) -> None:
        """In each process anew: a forked one has its parent's counts, which are not its own, and maybe a lock that
        nobody will open."""
        self._lock = threading.Lock()
        self._close_files()
        self._keys: dict[tuple[str, tuple[str, ...]], tuple[str, ...]] = {}

    # ---- counting ----

    def add(self, metric: Metric, labels: tuple[str, ...] = (), amount: float = 1.0) -> None:
        if amount:
            with self._lock, suppress(OSError):  # a full disk, or a worker that has ended: work goes on uncounted
                (key,) = self._keys_of(metric, labels)
                _add(self._file("counter"), key, amount)

    def observe(self, metric: Metric, seconds: float, labels: tuple[str, ...] = ()) -> None:
        with self._lock, suppress(OSError):
            *buckets, total = self._keys_of(metric, labels)
            file = self._file("histogram")
            _add(file, buckets[bisect_left(metric.buckets, seconds)], 1.0)
            _add(file, total, seconds)

    def _file(self, kind: str) -> MmapedDict:
        if kind not in self._files:
            path = self.directory / f"{kind}_{os.getpid()}.db"
            with path.open("ab") as file:
                if file.tell() == 0:  # all of it now: where a disk has no more room, writing into mapped memory kills
                    file.write(bytes(FILE_BYTES))
            self._files[kind] = MmapedDict(str(path))
        return self._files[kind]

    def _keys_of(self, metric: Metric, labels: tuple[str, ...]) -> tuple[str, ...]:
        known = self._keys.get((metric.name, labels))
        if known is None and len(self._keys) >= MOST_SERIES:
            labels = (OTHER,) * len(labels)
            known = self._keys.get((metric.name, labels))
        if known is None:
            known = self._keys[metric.name, labels] = tuple(_keys(metric, labels))
            for key in known if metric.buckets else ():  # a histogram has all its buckets from the first
                self._file("histogram").read_value(key)
        return known

    # ---- adding up, in the worker's main process ----

    def collect(self) -> Iterable[Family]:
        with self._lock:
            self._take_over_from_the_dead()
            files = [str(path) for path in self._paths() if path.stat().st_size]
            return list(MultiProcessCollector.merge(files))

    def take_over(self) -> None:
        """Has this process keep what dead ones have counted, and deletes their files."""
        with self._lock:
            self._take_over_from_the_dead()

    def _take_over_from_the_dead(self) -> None:
        for path in self._paths():
            kind, _, pid = path.stem.partition("_")
            if is_alive(int(pid)):
                continue
            with suppress(RuntimeError, struct.error):  # it was killed while it made the file
                for key, value, *_ in MmapedDict.read_all_values_from_file(str(path)):
                    _add(self._file(kind), key, value)
            path.unlink()

    def _paths(self) -> Iterator[Path]:
        return self.directory.glob("*.db")

    def close(self) -> None:
        """Deletes the folder; whatever is counted from now on, here or in processes that are left, is lost."""
        if os.getpid() == self._owner:
            with self._lock:
                self._close_files()
            shutil.rmtree(self.directory, ignore_errors=True)

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}


def _add(file: MmapedDict, key: str, amount: float) -> None:
    file.write_value(key, file.read_value(key)[0] + amount, 0.0)


def _keys(metric: Metric, labels: tuple[str, ...]) -> Iterator[str]:
    name, names, values = PREFIX + metric.name, list(metric.labels), list(labels)
    if not metric.buckets:
        yield mmap_key(name, f"{name}_total", names, values, metric.told)
        return
    for bound in (*metric.buckets, INF):
        yield mmap_key(name, f"{name}_bucket", [*names, "le"], [*values, floatToGoString(bound)], metric.told)
    yield mmap_key(name, f"{name}_sum", names, values, metric.told)
