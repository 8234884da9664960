"""What the demo shows: progress from the store, the report, the history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby

from rich.console import Console
from rich.table import Table

from celery_flows import FlowEvent
from examples.verify_packages.app import Report

console = Console(highlight=False)
MEBIBYTE = 1024 * 1024


def show_report(report: Report) -> None:
    """The report as a table."""
    table = Table("what", "count", "which", title=f"Packages in {report.folder}", title_justify="left")
    table.add_row("distributions", str(report.distributions), "")
    table.add_row("files checked", str(report.files), f"{report.bytes / MEBIBYTE:.1f} MiB")
    for name in ("altered", "missing", "unlisted"):
        paths = getattr(report, name)
        table.add_row(name, str(len(paths)), "\n".join(paths[:5] + ["…"] * (len(paths) > 5)))
    console.print(table)


def show_history(events: list[FlowEvent]) -> None:
    """The flow's events, oldest first: its own one by one, those of its Celery steps summed up in between."""
    table = Table("at (UTC)", "event", "about", title="History", title_justify="left")
    begun: set[str] = set()
    for is_own, group in groupby(events, key=lambda event: event.revision is not None):
        run = list(group)
        if is_own:
            for event in run:
                table.add_row(_at(event), event.kind, event.payload_json.get("set", {}).get("current_step", ""))
            continue
        for kind, count in Counter(event.kind for event in run).items():
            table.add_row(_at(run[0]), f"{kind} x {count}", "")
        for event in run:
            run_id = event.payload_json["run_id"]
            if event.kind == "step_started" and run_id in begun:
                table.add_row(_at(event), "[red]step_started again[/red]", f"its worker died: {run_id}")
            begun |= {run_id} if event.kind == "step_started" else set()
    console.print(table)


def _at(event: FlowEvent) -> str:
    return event.at.strftime("%H:%M:%S.%f")[:-3]


def milestones(total: int) -> Iterator[int]:
    """The counts at which progress is told where there is no terminal: every tenth."""
    return (max(1, total * tenth // 10) for tenth in range(1, 11))
