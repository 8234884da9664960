"""What was measured, as a table and as JSON, and whether the targets are met."""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from celery_flows.tasks.settings import FlowSettings
from tests.recovery.faults import Fault

HEAD = ("fault", "broker", "database", "rounds", "result", "median", "worst", "target")


@dataclass
class Line:
    """One fault with one broker and one database."""

    fault: Fault
    broker: str
    database: str
    rounds: int
    seconds: list[float] = field(default_factory=list)
    played: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.fault.name}, {self.broker}, {self.database}"

    @property
    def command(self) -> str:
        """What repeats this line."""
        return (
            f"python -m tests.recovery --fault {self.fault.name} --broker {self.broker} "
            f"--database {self.database} --rounds {self.rounds}"
        )

    @property
    def result(self) -> str:
        if self.wrong:
            return f"{len(self.wrong)} of {self.played} wrong: {self.wrong[0]}"
        return "recovered" if self.played else "not played"

    @property
    def worst(self) -> float | None:
        return max(self.seconds, default=None)

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def met(self) -> bool | None:
        """Whether the target is met by every round; None: there is none."""
        target = self.fault.target_seconds
        if target is None:
            return None
        return self.worst is not None and not self.wrong and self.worst <= target

    @property
    def is_good(self) -> bool:
        return self.played > 0 and not self.wrong and self.met is not False

    def cells(self) -> tuple[str, ...]:
        target = "" if self.met is None else f"{self.fault.target_seconds:g} s: {'met' if self.met else 'MISSED'}"
        figures = ("-" if value is None else f"{value:.1f} s" for value in (self.median, self.worst))
        return (self.fault.name, self.broker, self.database, str(self.played), self.result, *figures, target)

    def as_json(self) -> dict[str, Any]:
        return {
            "fault": self.fault.name, "broker": self.broker, "database": self.database, "rounds": self.played,
            "result": self.result, "seconds": [round(value, 3) for value in self.seconds], "wrong": self.wrong,
            "median_seconds": self.median, "worst_seconds": self.worst,
            "target_seconds": self.fault.target_seconds, "target_met": self.met, "command": self.command,
        }  # fmt: skip


def table(lines: list[Line]) -> str:
    """A Markdown table."""
    rows = [HEAD, *(line.cells() for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    ruled = [rows[0], tuple("-" * width for width in widths), *rows[1:]]
    return "\n".join(f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))} |" for row in ruled)


def surroundings() -> dict[str, Any]:
    """What the figures depend on: the machine, the versions, and our settings, which are the defaults."""
    defaults = {name: option.default for name, option in FlowSettings.model_fields.items()}
    shown = ("lease_seconds", "sweep_seconds", "republish_seconds", "max_crashes")
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "celery": version("celery"),
        "kombu": version("kombu"),
        "settings": {f"flow_{name}": defaults[name] for name in shown},
    }
