"""What undoes a step, should its flow fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from celery_flows.tasks.options import StepOptions


@dataclass(frozen=True, slots=True)
class Undo:
    """A step that is yet to be taken, if at all."""

    options: StepOptions
    work: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """What it is called where it could not begin."""
        return str(getattr(self.work, "task", None) or getattr(self.work, "__name__", type(self.work).__name__))
