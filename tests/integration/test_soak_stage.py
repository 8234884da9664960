"""The soak's faults on real processes: a stop ends when its time is over, a death is noticed and told."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from celery_flows.worker.embedded import Processes
from tests.soak.stage import Stage, comes_to, dies
from tests.support.waiting import until
from tests.support.workers import is_alive

SLEEPER = (sys.executable, "-c", "import time; time.sleep(60)")
NAME = "worker-1"


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """A stage whose workers only sleep."""
    monkeypatch.setattr("tests.soak.stage.CELERY", ("sleep", "60"))
    monkeypatch.setattr(Stage, "_arguments", lambda *_: [])
    with Processes(tmp_path) as processes, closing(Stage(processes)) as made:
        made._start(NAME)
        yield made


def test_what_was_stopped_goes_on_though_nobody_asks_the_stage(stage: Stage) -> None:
    pid, before = stage.pid(NAME), time.time()
    assert stage.stop([pid], 0.3) == [pid]
    until(lambda: stage.stops, "the stop is over")
    assert comes_to(pid, "S")
    [stop] = stage.stops
    assert (stop.pid, before <= stop.since <= stop.until - 0.3) == (pid, True)


def test_a_process_that_is_gone_is_not_counted_as_stopped(stage: Stage) -> None:
    gone = subprocess.Popen(SLEEPER)
    gone.kill()
    gone.wait()
    assert stage.stop([gone.pid], 5) == []


def test_a_killed_worker_is_replaced_and_its_death_is_the_monkeys(stage: Stage) -> None:
    killed = stage.pid(NAME)
    assert stage.kill(NAME) == [killed]
    stage.tick()
    assert is_alive(stage.pid(NAME))
    assert stage.pid(NAME) != killed
    assert (dict(stage.restarts), stage.deaths) == ({"worker -9": 1}, [])


def test_a_worker_that_ends_by_itself_is_replaced_and_told(stage: Stage) -> None:
    ended = stage.processes.children[NAME]
    ended.send_signal(signal.SIGTERM)  # not through the stage
    ended.wait()
    stage.tick()
    [death] = stage.deaths
    assert death.startswith("worker-1 ended by itself with -15")


def test_a_worker_that_does_not_stop_when_told_is_told_and_killed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.soak.stage.GOODBYE_SECONDS", 0.0)
    pid = stage.pid(NAME)
    assert stage.tell(NAME, signal.SIGCONT)  # a signal that does nothing
    assert not stage.tell(NAME, signal.SIGCONT)

    def is_told() -> bool:
        stage.tick()
        return bool(stage.hung)

    until(is_told, "it is told")
    assert dies(pid)
    [hung] = stage.hung
    assert hung.startswith(NAME)


def test_nothing_is_left_in_the_end(stage: Stage) -> None:
    pid = stage.pid(NAME)
    stage.stop([pid], 60)
    stage.close()
    assert not is_alive(pid)
