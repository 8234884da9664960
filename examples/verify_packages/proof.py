"""Do the numbers add up? The flow's own account, held against a recount and against the log of what really ran."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from celery_flows import FlowEvent, FlowStep, FlowStepStatus
from examples.verify_packages import audit
from examples.verify_packages.audit import Report


def findings(report: Report, steps: list[FlowStep], events: list[FlowEvent], effects: Path) -> list[str]:
    """What does not add up; nothing, if all is well."""
    return [*recount(report), *reruns(steps, events, effects)]


def recount(report: Report) -> list[str]:
    """Checks the report against the folder, one distribution after another, without any flow."""
    folder = Path(report.folder)
    checked = [audit.check(folder, each) for each in audit.find_distributions(folder).values()]
    expected: dict[str, int | list[str]] = {
        "distributions": len(checked),
        "files": sum(each["files"] for each in checked),
        "bytes": sum(each["bytes"] for each in checked),
        "altered": sorted(path for each in checked for path in each["altered"]),
        "missing": sorted(path for each in checked for path in each["missing"]),
        "unlisted": audit.unlisted(folder),
    }
    return [
        f"{name}: reported {_told(reported)}, counted again {_told(again)}"
        for name, again in expected.items()
        if (reported := _in_order(getattr(report, name))) != again
    ]


def _in_order(value: int | list[str]) -> int | list[str]:
    return sorted(value) if isinstance(value, list) else value


def _told(value: int | list[str]) -> str:
    return str(value) if isinstance(value, int) else ", ".join(value) or "none"


def reruns(steps: list[FlowStep], events: list[FlowEvent], effects: Path) -> list[str]:
    """Names each step that ran after it was recorded, or more often than workers began it."""
    ran = Counter(json.loads(line)["name"] for line in effects.read_text().splitlines())
    began = Counter(event.payload_json["run_id"] for event in events if event.kind == "step_started")
    names = names_of(steps)
    wrong = [
        f"{name}: its body ran {ran[name]} times, workers began it {began[run_id]} times"
        for run_id, name in names.items()
        if not 1 <= ran[name] <= began[run_id]
    ]
    recorded: set[str] = set()
    for event in sorted(events, key=lambda event: event.id):
        run_id = event.payload_json.get("run_id")
        if event.kind == "step_started" and run_id in recorded:
            wrong.append(f"{names.get(run_id, run_id)}: began again after it was recorded")
        if event.kind == "step_succeeded" and run_id is not None:
            recorded.add(run_id)
    return wrong + [f"{step.task} is {step.status}" for step in steps if step.status is not FlowStepStatus.SUCCEEDED]


def names_of(steps: list[FlowStep]) -> dict[str, str]:
    """The distribution that each Celery step checks, by the step's run id."""
    return {step.run_id: step.args_json["args"][1] for step in steps if step.args_json is not None}


def begun_again(steps: list[FlowStep], events: list[FlowEvent]) -> list[str]:
    """The distributions whose check a second worker took over, because the first had died with it in hand."""
    began = Counter(event.payload_json["run_id"] for event in events if event.kind == "step_started")
    return sorted(name for run_id, name in names_of(steps).items() if began[run_id] > 1)
