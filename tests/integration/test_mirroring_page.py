"""docs/guide/mirroring.md does what it says: its blocks are run, one after another, as they stand there."""

from __future__ import annotations

import json
import sys

from tests.support.commandline import ROOT, Project


def test_its_blocks_run_one_after_another(database_url: str) -> None:
    ran = Project(ROOT, {}).run(sys.executable, "-W", "error", "-m", "tests.support.mirroring_page", database_url)

    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {
        "sum": 3,
        "canvas": ["the month's total: finished", *["shop.pick succeeded"] * 2, "shop.total succeeded"],
        "rule": ["what happens at night: finished", "shop.nightly succeeded", *["shop.pick succeeded"] * 2],
    }
