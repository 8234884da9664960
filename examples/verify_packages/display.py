"""What the demo shows: progress from the store, the history, the report."""

from __future__ import annotations

import sys
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from celery_flows import FlowEvent
from examples.verify_packages.audit import Report

PIPE_WIDTH = 120
MEBIBYTE = 1024 * 1024
SHOWN_PATHS = 5

console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def say(line: str, style: str = "") -> None:
    """A line, as long as it is, and as it is: names of files are no markup."""
    console.print(line, style=style, soft_wrap=True, markup=False)


def show_report(report: Report) -> None:
    """The report as a table."""
    table = _table("Report", "what", "count", "which")
    table.add_row("packages", str(report.distributions), Text(report.folder))
    table.add_row("files", str(report.files), f"{report.bytes / MEBIBYTE:.1f} MiB")
    for name in ("altered", "missing", "unlisted"):
        paths: list[str] = getattr(report, name)
        shown = "\n".join(paths[:SHOWN_PATHS] + ["…"] * (len(paths) > SHOWN_PATHS))
        table.add_row(name, str(len(paths)), Text(shown), style="yellow" if paths else "")
    console.print(table)


def show_history(events: list[FlowEvent], names: dict[str, str]) -> None:
    """The flow's events, oldest first: its own one by one, those of its Celery steps summed up in between."""
    table = _table("History", "at (UTC)", "event", "about")
    begun: set[str] = set()
    for is_own, group in groupby(events, key=lambda event: event.revision is not None):
        run = list(group)
        if is_own:
            for event in run:
                table.add_row(_at(event), event.kind, Text(_step(event)))
            continue
        for kind in dict.fromkeys(event.kind for event in run):
            alike = [event for event in run if event.kind == kind]
            until = f"until {_at(alike[-1])}" if len(alike) > 1 else ""
            table.add_row(_at(alike[0]), f"{kind} x {len(alike)}", until)
        for event in run:
            run_id = event.payload_json["run_id"]
            if event.kind == "step_started" and run_id in begun:
                about = Text(f"{names.get(run_id, run_id)}: its worker had died")
                table.add_row(_at(event), "step_started again", about, style="red")
            begun |= {run_id} if event.kind == "step_started" else set()
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _step(event: FlowEvent) -> str:
    step: Any = event.payload_json.get("set", {}).get("current_step") or ""
    return str(step).rpartition(".")[2]


def _at(event: FlowEvent) -> str:
    return event.at.strftime("%H:%M:%S.%f")[:-3]


class Milestones:
    """Tells progress where there is no terminal: every tenth."""

    def __init__(self) -> None:
        self._told = 0

    def reached(self, done: int, total: int) -> bool:
        """Whether the next tenth, or a later one, is reached."""
        tenth = done * 10 // total
        tells = tenth > self._told
        self._told = max(self._told, tenth)
        return tells
