"""Do the numbers add up? The flow's own account, held against a recount and against the log of what really ran."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from celery_flows import FlowEvent, FlowStep, FlowStepStatus
from examples.verify_packages import audit
from examples.verify_packages.app import Report


def findings(report: Report, steps: list[FlowStep], events: list[FlowEvent], effects: Path) -> list[str]:
    """What does not add up; nothing, if all is well."""
    return [*recount(report), *reruns(steps, events, effects)]


def recount(report: Report) -> list[str]:
    """Checks the report against the folder, one distribution after another, without any flow."""
    folder = Path(report.folder)
    checked = [audit.check(folder, each) for each in audit.find_distributions(folder).values()]
    expected = {
        "distributions": len(checked),
        "files": sum(each["files"] for each in checked),
        "bytes": sum(each["bytes"] for each in checked),
        "altered": sum(len(each["altered"]) for each in checked),
        "missing": sum(len(each["missing"]) for each in checked),
    }
    reported = {
        **report.model_dump(include={"distributions", "files", "bytes"}),
        "altered": len(report.altered),
        "missing": len(report.missing),
    }
    return [
        f"{name}: reported {reported[name]}, counted again {count}"
        for name, count in expected.items()
        if reported[name] != count
    ]


def reruns(steps: list[FlowStep], events: list[FlowEvent], effects: Path) -> list[str]:
    """Names each step that ran after it was recorded, or more often than workers began it."""
    ran = Counter(json.loads(line)["name"] for line in effects.read_text().splitlines())
    began = Counter(event.payload_json["run_id"] for event in events if event.kind == "step_started")
    names = {step.run_id: step.args_json["args"][1] for step in steps if step.args_json is not None}
    wrong = [
        f"{name}: its body ran {ran[name]} times, workers began it {began[run_id]} times"
        for run_id, name in names.items()
        if not 1 <= ran[name] <= began[run_id]
    ]
    recorded: set[str] = set()
    for event in sorted(events, key=lambda event: event.id):
        run_id = event.payload_json.get("run_id")
        if event.kind == "step_started" and run_id in recorded:
            wrong.append(f"{run_id}: began again after it was recorded")
        if event.kind == "step_succeeded" and run_id is not None:
            recorded.add(run_id)
    return wrong + [f"{step.task} is {step.status}" for step in steps if step.status is not FlowStepStatus.SUCCEEDED]
