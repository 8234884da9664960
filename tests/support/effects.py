"""A log of what really ran, in whatever process: one JSON object a line, each appended by a single write."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any


class EffectLog:
    """Effects outside the store, as a payment or a letter would be: nothing takes them back."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def append(self, effect: str, **more: Any) -> None:
        """Adds one effect, with the process that had it."""
        line = json.dumps({"effect": effect, "pid": os.getpid(), **more}) + "\n"
        log = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(log, line.encode())  # O_APPEND makes it whole, whoever else writes
        finally:
            os.close(log)

    def read(self, effect: str | None = None) -> list[dict[str, Any]]:
        """All effects, or those of one name, in the order of their writes."""
        if not self.path.exists():
            return []
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [line for line in lines if effect is None or line["effect"] == effect]

    def counts(self) -> Counter[str]:
        """How often each effect was had."""
        return Counter(line["effect"] for line in self.read())
