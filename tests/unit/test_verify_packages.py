"""The example's own work and its proof: each kind of damage is found, and no planted lie passes."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from celery_flows import FlowEvent, FlowStep, FlowStepStatus
from examples.verify_packages import audit, proof
from examples.verify_packages.audit import Report
from tests.support.packages import install, install_many

FLOW = uuid4()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three distributions, all as they should be."""
    place = tmp_path / "site-packages"
    place.mkdir()
    install_many(place, 3)
    return place


def a_report(folder: Path) -> Report:
    """What an honest audit says."""
    checked = [audit.check(folder, each) for each in audit.find_distributions(folder).values()]
    return Report(
        folder=str(folder),
        distributions=len(checked),
        files=sum(each["files"] for each in checked),
        bytes=sum(each["bytes"] for each in checked),
        altered=[path for each in checked for path in each["altered"]],
        missing=[path for each in checked for path in each["missing"]],
        unlisted=audit.unlisted(folder),
    )


# The audit


def test_what_is_as_it_was_installed_is_counted_and_nothing_is_found(folder: Path) -> None:
    report = a_report(folder)

    assert (report.distributions, report.files) == (3, 3 * 5)
    assert report.bytes == sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert (report.altered, report.missing, report.unlisted) == ([], [], [])


@pytest.mark.parametrize("content", [b"answer = 43\n", b"answer = 4242\n"], ids=["same size", "other size"])
def test_an_altered_file_is_found(folder: Path, content: bytes) -> None:
    (folder / "made_up_01/module.py").write_bytes(content)

    assert a_report(folder).altered == ["made_up_01/module.py"]


def test_a_missing_file_is_found_and_not_counted(folder: Path) -> None:
    (folder / "made_up_01/module.py").unlink()
    report = a_report(folder)

    assert (report.missing, report.files) == (["made_up_01/module.py"], 3 * 5 - 1)


def test_a_file_that_no_record_lists_is_found_unless_python_made_it(folder: Path) -> None:
    (folder / "stray.py").touch()
    (folder / "made_up_00/__pycache__").mkdir()
    (folder / "made_up_00/__pycache__/module.cpython-311.pyc").touch()

    assert a_report(folder).unlisted == ["stray.py"]


def test_files_outside_the_folder_belong_to_their_distribution(folder: Path) -> None:
    install(folder, "tool", {"../bin/tool": b"#!python\n"})
    (folder / "../bin/tool").write_bytes(b"#!perl..\n")
    report = a_report(folder)

    assert (report.altered, report.unlisted) == (["../bin/tool"], [])


def test_a_distribution_without_metadata_is_nobodys(folder: Path) -> None:
    (folder / "made_up_02-1.0.dist-info/METADATA").unlink()
    report = a_report(folder)

    assert report.distributions == 2
    assert "made_up_02/module.py" in report.unlisted


def test_a_distribution_that_was_uninstalled_meanwhile_is_named(folder: Path) -> None:
    assert audit.find_distribution(folder, "made-up-00").name == "made-up-00"
    with pytest.raises(LookupError, match="gone is no longer installed"):
        audit.find_distribution(folder, "gone")


def test_a_virtual_environment_is_searched_for_its_packages(tmp_path: Path) -> None:
    inner = tmp_path / "lib/python3.11/site-packages"
    inner.mkdir(parents=True)

    assert audit.packages_folder(str(tmp_path)) == inner
    assert audit.packages_folder(str(inner)) == inner
    with pytest.raises(FileNotFoundError, match="is no folder"):
        audit.packages_folder(str(tmp_path / "nowhere"))


# The proof


class History:
    """What store and effect log say of a run in which everything went well, to be falsified."""

    def __init__(self, folder: Path, effects: Path) -> None:
        self.report = a_report(folder)
        self.steps: list[FlowStep] = []
        self.events: list[FlowEvent] = []
        self.effects = effects
        self._ids = count(1)
        for name in audit.find_distributions(folder):
            self.run(name)

    def run(self, name: str) -> None:
        """A step that is begun, runs and is recorded."""
        step = FlowStep(
            flow_id=FLOW, run_id=f"run of {name}", task="check_distribution", status=FlowStepStatus.SUCCEEDED,
            args_json={"args": [self.report.folder, name], "kwargs": {}},
        )  # fmt: skip
        self.steps.append(step)
        self.event("step_started", step.run_id)
        self.effect(name)
        self.event("step_succeeded", step.run_id)

    def event(self, kind: str, run_id: str) -> None:
        payload = {"run_id": run_id}
        event = FlowEvent(id=next(self._ids), flow_id=FLOW, kind=kind, payload_json=payload, at=datetime.now(UTC))
        self.events.append(event)

    def effect(self, name: str) -> None:
        with self.effects.open("a") as log:
            log.write(json.dumps({"name": name, "pid": 1}) + "\n")

    def falsify(self, **fields: Any) -> None:
        self.report = self.report.model_copy(update=fields)

    def findings(self) -> list[str]:
        return proof.findings(self.report, self.steps, self.events, self.effects)


@pytest.fixture
def history(folder: Path, tmp_path: Path) -> History:
    """A run over a folder with one file of each kind of damage."""
    (folder / "made_up_00/module.py").write_bytes(b"answer = 43\n")
    (folder / "made_up_01/module.py").unlink()
    (folder / "stray.py").touch()
    return History(folder, tmp_path / "effects.jsonl")


def test_an_honest_account_passes(history: History) -> None:
    assert history.findings() == []
    assert proof.begun_again(history.steps, history.events) == []


@pytest.mark.parametrize(
    "lie",
    [
        {"distributions": 2},
        {"files": 13},
        {"bytes": 0},
        {"altered": []},
        {"altered": ["made_up_02/module.py"]},
        {"altered": ["made_up_00/module.py", "made_up_00/module.py"]},
        {"missing": ["made_up_01/__init__.py"]},
        {"unlisted": []},
    ],
    ids=str,
)
def test_a_report_that_lies_does_not_pass(history: History, lie: dict[str, Any]) -> None:
    history.falsify(**lie)

    (finding,) = history.findings()
    assert finding.startswith(f"{next(iter(lie))}: reported ")


def test_a_step_that_ran_more_often_than_it_was_begun_does_not_pass(history: History) -> None:
    history.effect("made-up-01")

    assert history.findings() == ["made-up-01: its body ran 2 times, workers began it 1 times"]


def test_a_step_that_never_ran_does_not_pass(history: History) -> None:
    lines = history.effects.read_text().splitlines(keepends=True)
    history.effects.write_text("".join(lines[1:]))

    (finding,) = history.findings()
    assert finding.endswith("its body ran 0 times, workers began it 1 times")


def test_a_step_that_ran_again_after_it_was_recorded_does_not_pass(history: History) -> None:
    history.event("step_started", "run of made-up-01")
    history.effect("made-up-01")

    assert history.findings() == ["made-up-01: began again after it was recorded"]


def test_a_step_that_ran_again_before_it_was_recorded_passes_and_is_named(history: History) -> None:
    started = next(event for event in history.events if event.payload_json["run_id"] == "run of made-up-01")
    history.events.insert(0, started.but(id=0))
    history.effect("made-up-01")

    assert history.findings() == []
    assert proof.begun_again(history.steps, history.events) == ["made-up-01"]


def test_a_step_that_did_not_succeed_does_not_pass(history: History) -> None:
    history.steps[0] = history.steps[0].but(status=FlowStepStatus.FAILED)

    assert history.findings() == ["check_distribution is failed"]
