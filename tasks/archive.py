"""Where pruned flows go before they are deleted, if an application wants to keep them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class JsonLinesFile:
    """An archive of pruned flows: appends a line of JSON for each to a file, readable by its owner alone, and returns
    once they are on the disk.

    Raises (when called):
        OSError: it cannot be written; what was to be archived is not deleted.
    """

    path: str | os.PathLike[str]

    def __call__(self, lines: Sequence[str]) -> None:
        opened = os.open(Path(self.path), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(opened, "a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
