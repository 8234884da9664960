"""Observations → store: a task waits until its own are written, but never for long."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from celery_flows.store import Flow, StoreError, mirrors
from celery_flows.store.observations import Observation, in_order
from celery_flows.store.script import Call

if TYPE_CHECKING:
    from celery_flows.tasks.runtime import Runtime

log = logging.getLogger("celery_flows.mirror")

PATIENCE_SECONDS = 0.5  # how long a task may be held up by a database that does not answer
LAST_SECONDS = 2.0  # how long a process that ends waits for what is left
RETRY_SECONDS = 1.0  # between tries to reach it again
BATCH = 500  # entries written at once
KEPT = 10_000  # entries kept for a database that is away; what comes then is dropped, and counted


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """What is to be written together: a flow that is born with it, perhaps, and what was seen."""

    seen: Sequence[Observation]
    born: Flow | None = None
    written: threading.Event = field(default_factory=threading.Event)


class Recorder:
    """Writes observations in the order they come, from a thread of its own, one process one recorder.

    Whoever records waits for the commit, so that a row is as true as the task is far. When that takes longer than
    ``patience_seconds``, or the database refuses, nobody waits any more until the thread has caught up: an outage
    costs a process one such wait, and of what happened meanwhile the last :data:`KEPT` entries are written afterwards.
    """

    def __init__(self, runtime: Runtime, patience_seconds: float) -> None:
        self._runtime, self._patience = runtime, patience_seconds
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._entries: deque[Entry] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_behind = False
        self._dropped = 0

    def record(self, seen: Sequence[Observation], born: Flow | None = None) -> None:
        """Has the observations written, and waits for that, within bounds. Raises nothing that the database does."""
        if self._pid != os.getpid():  # a forked child: the thread is the parent's, and what it holds too
            self._begin()
        entry = Entry(in_order(seen), born)
        with self._changed:
            waits = not self._is_behind
            if len(self._entries) >= KEPT:
                self._dropped += 1
                return
            self._entries.append(entry)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="celery-flows mirror", daemon=True)
                self._thread.start()
            self._changed.notify()
        if waits and not entry.written.wait(self._patience):
            self._fall_behind("it takes long")

    def flush(self, seconds: float = LAST_SECONDS) -> bool:
        """Waits until nothing is left to be written, for so long at most; whether nothing is."""
        if self._pid != os.getpid():
            return True
        with self._changed:
            return self._changed.wait_for(lambda: not self._entries, seconds)

    def _fall_behind(self, why: str) -> None:
        with self._changed:
            was_behind, self._is_behind = self._is_behind, True
            waiting = list(self._entries)
        for entry in waiting:
            entry.written.set()  # wait no longer
        if not was_behind:
            log.warning("mirrored flows are recorded later: the database is away, or slow (%s)", why)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._entries)
                batch = _first_batch(self._entries)
            self._write_surely(batch)
            for entry in batch:
                entry.written.set()
            with self._changed:
                for _ in batch:
                    self._entries.popleft()
                self._changed.notify_all()
                if self._is_behind and not self._entries:
                    self._catch_up()

    def _catch_up(self) -> None:
        log.info("mirrored flows are recorded as they go again; %d records were dropped", self._dropped)
        self._is_behind, self._dropped = False, 0

    def _write_surely(self, batch: list[Entry]) -> None:
        """Writes a batch, however often it takes; what the database will not have is left out."""
        while True:
            try:
                self._write(batch)
            except StoreError as error:
                if error.is_passing:
                    self._fall_behind(type(error.__cause__ or error).__name__)
                    time.sleep(RETRY_SECONDS)
                    continue
                self._write_singly(batch, error)
            except Exception as error:
                self._write_singly(batch, error)
            return

    def _write_singly(self, batch: list[Entry], error: Exception) -> None:
        if len(batch) > 1:
            for entry in batch:
                self._write_surely([entry])
        else:
            log.warning("%d observations are not recorded (%s)", len(batch[0].seen), type(error).__name__)

    def _write(self, batch: list[Entry]) -> None:
        store, silent = self._runtime.store, self._runtime.settings.mirror_silent_seconds
        for entry in batch:
            if entry.born is not None:
                store.attempt(Call(mirrors.create, (entry.born, entry.seen, silent)), patience=0.0)
        seen = [each for entry in batch if entry.born is None for each in entry.seen]
        store.attempt(Call(mirrors.observe, (seen,)), patience=0.0)
        # Even if the same batch published more: that may have been closed elsewhere before it was told of here.
        if closed := {each.flow_id for each in seen if each.status.is_terminal}:
            for flow_id in store.attempt(Call(mirrors.without_live_steps, (closed,)), patience=0.0):
                store.attempt(Call(mirrors.end_if_over, (flow_id,)), patience=0.0)


def _first_batch(entries: deque[Entry]) -> list[Entry]:
    """The first entries, as far as they tell of different steps: one statement changes a row once."""
    batch: list[Entry] = []
    known: set[tuple[object, str]] = set()
    for entry in entries:
        steps = {(each.flow_id, each.run_id) for each in entry.seen}
        if batch and (len(batch) >= BATCH or steps & known or entry.born is not None):
            break
        batch.append(entry)
        known |= steps
        if entry.born is not None:  # its own steps come with it
            break
    return batch
