"""The tool that measures recovery: a real fault gives a figure, and a fault that did not strike gives none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.recovery.faults import FAULTS
from tests.recovery.proof import Broken, NotStruck, promise, proof
from tests.recovery.report import Line, table
from tests.support.waiting import until
from tests.support.workers import ROOT, is_alive

COMMAND = [sys.executable, "-m", "tests.recovery"]
QUICK = ["--fault", "child-killed", "--broker", "embedded", "--database", "sqlite"]


def writers_below(folder: Path) -> list[int]:
    """The processes whose output goes to a file below this folder, as every worker's and broker's does."""
    found = []
    for output in Path("/proc").glob("[0-9]*/fd/1"):
        pid = int(output.parts[2])
        try:
            below = str(output.readlink()).startswith(f"{folder}/")
        except OSError:  # it has ended
            continue
        if below and is_alive(pid):
            found.append(pid)
    return found


@pytest.fixture
def surroundings() -> Iterator[dict[str, str]]:
    """An environment whose temporary files go to a folder of their own, and that is told what it must not heed."""
    with tempfile.TemporaryDirectory(prefix="r-") as folder:  # not below tmp_path: the path of a unix socket is short
        yield {**os.environ, "TMPDIR": folder, "FLOW_LEASE_SECONDS": "1", "CELERY_BROKER_URL": "memory://"}


def test_a_killed_child_recovers_within_its_target_by_the_command(tmp_path: Path, surroundings: dict[str, str]) -> None:
    file = tmp_path / "figures.json"
    done = subprocess.run(
        [*COMMAND, *QUICK, "--json", str(file)], cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures: dict[str, Any] = json.loads(file.read_text())
    assert figures["settings"]["flow_lease_seconds"] == 30
    [line] = figures["lines"]
    assert (line["fault"], line["broker"], line["database"]) == ("child-killed", "embedded", "sqlite")
    assert (line["result"], line["rounds"], line["target_met"]) == ("recovered", 1, True)
    [seconds] = line["seconds"]
    assert 0 < seconds <= line["target_seconds"] == 15
    assert line["command"] in done.stdout
    assert "| recovered |" in done.stdout
    assert writers_below(Path(surroundings["TMPDIR"])) == []
    assert list(Path(surroundings["TMPDIR"]).iterdir()) == []


def test_stopped_in_the_middle_it_leaves_nothing_behind(tmp_path: Path, surroundings: dict[str, str]) -> None:
    folder = Path(surroundings["TMPDIR"])
    with (tmp_path / "output").open("wb") as output:
        tool = subprocess.Popen(
            [*COMMAND, *QUICK, "--rounds", "50"], cwd=ROOT, env=surroundings, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            until(lambda: list(folder.rglob("*.ready")), "a worker serves", within_seconds=60)
            assert len(writers_below(folder)) >= 4  # a worker with two children, and its broker
            tool.send_signal(signal.SIGINT)
            assert tool.wait(60) == 130
        finally:
            tool.kill()
            tool.wait()
    assert writers_below(folder) == []
    assert list(folder.iterdir()) == []


def test_a_line_is_bad_when_a_round_misses_the_target_or_is_no_figure() -> None:
    def line(*seconds: float, wrong: tuple[str, ...] = (), fault: str = "child-killed") -> Line:
        played = len(seconds) + len(wrong)
        return Line(FAULTS[fault], "redis", "sqlite", played, list(seconds), played, list(wrong))

    assert line(1.0, 14.9).is_good
    late, wrong = line(1.0, 15.1), line(1.0, wrong=("not struck: no proof",))
    assert (late.is_good, late.met) == (False, False)
    assert (wrong.is_good, wrong.met) == (False, False)
    assert "15 s: MISSED" in table([late])
    assert "1 of 2 wrong: not struck: no proof" in table([wrong])
    assert line(99.0, fault="messages-lost").is_good  # has no target
    assert not line(fault="messages-lost").is_good  # was not played


def test_a_fault_that_did_not_strike_and_a_broken_promise_are_told_apart() -> None:
    with pytest.raises(NotStruck, match="no proof that it died: it is there"), proof("it died"):
        raise AssertionError("it is there")
    with pytest.raises(Broken, match="all ran once: twice"), promise("all ran once"):
        raise AssertionError("twice")
