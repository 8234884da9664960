"""The demo, as a stranger runs it: a worker is killed, the flow finishes, and the report is right.

On servers of its own it is run by tests/acceptance/test_readme.py, as ``make demo``.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.support.brokers import Broker
from tests.support.commandline import ROOT, Project
from tests.support.packages import install_many

COUNT = 24
FILES = 5 * COUNT  # three of the package, METADATA and RECORD


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder with some distributions, as pip left them."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    install_many(folder, COUNT)
    return folder


def run_demo(packages: Path, report: Path, *options: str, **settings: str) -> CompletedProcess[str]:
    """Runs the demo to its end, without a terminal."""
    command = [sys.executable, "-m", "examples.verify_packages", "demo", str(packages), "--report", str(report)]
    return Project(ROOT, settings).run(*command, *options)


def assert_right(ended: CompletedProcess[str], packages: Path, report: Path, **found: list[str]) -> None:
    """It finished, a worker was killed, nothing that was recorded ran again, and the report says what is so."""
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    said = ended.stdout.splitlines()
    assert said[-1] == "finished"
    assert [line for line in said if re.fullmatch(r"killed worker-\d with SIGKILL at .*: exit code -9", line)]
    assert "recorded steps that ran again: none" in ended.stdout
    assert f"{COUNT + 2} of {COUNT + 2} steps done" in said

    sizes = [file.stat().st_size for file in packages.rglob("*") if file.is_file()]
    missing = found.get("missing", [])
    expected: dict[str, Any] = {"folder": str(packages), "distributions": COUNT, "files": FILES - len(missing)}
    expected |= {"bytes": sum(sizes), "altered": [], "missing": [], "unlisted": []}
    assert json.loads(report.read_text()) == expected | found


def test_damage_done_on_purpose_is_reported_over_postgresql_and_redis(
    packages: Path, tmp_path: Path, postgresql_url: str, redis_server: Broker
) -> None:
    (packages / "made_up_03/module.py").write_text("answer = 43\n")
    (packages / "made_up_07/table.bin").unlink()
    (packages / "made_up_11/[stray].py").touch()

    report = tmp_path / "report.json"
    ended = run_demo(packages, report, FLOW_STORE_URL=postgresql_url, CELERY_BROKER_URL=redis_server.url)

    assert_right(
        ended, packages, report, altered=["made_up_03/module.py"], missing=["made_up_07/table.bin"],
        unlisted=["made_up_11/[stray].py"],
    )  # fmt: skip
    for path in ("made_up_03/module.py", "made_up_07/table.bin", "made_up_11/[stray].py"):
        assert path in ended.stdout
    assert re.search(r"^database postgresql\+psycopg://\S+, broker redis", ended.stdout)


def test_it_finishes_over_postgresql_and_rabbitmq(
    packages: Path, tmp_path: Path, postgresql_url: str, rabbitmq_server: Broker
) -> None:
    report = tmp_path / "report.json"
    ended = run_demo(packages, report, FLOW_STORE_URL=postgresql_url, CELERY_BROKER_URL=rabbitmq_server.url)

    assert_right(ended, packages, report)
    assert "guest:guest" not in ended.stdout


@pytest.mark.parametrize(
    ("environment", "report", "says"),
    [
        ("nowhere", "report.json", "nowhere is no folder"),
        ("empty", "report.json", "no packages are installed in"),
        ("empty", "nowhere/report.json", "where the report should go, is no folder"),
    ],
)
def test_what_cannot_be_audited_is_told_before_anything_is_started(
    tmp_path: Path, environment: str, report: str, says: str
) -> None:
    (tmp_path / "empty").mkdir()
    ended = run_demo(tmp_path / environment, tmp_path / report)

    assert ended.returncode == 1
    assert ended.stdout == ""
    assert re.fullmatch(f"Error: .*{says}.*\n", ended.stderr)
