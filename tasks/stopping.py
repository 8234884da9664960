"""Whether this worker has been told to stop: a byte that its parent process shares with the children it forks."""

from __future__ import annotations

import mmap


class Stopping:
    """Made before the pool forks; set by the parent, seen by every child at once. Never taken back."""

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)  # anonymous, so shared with forked children

    def set(self) -> None:
        """From now on nothing new is begun here."""
        self._byte[0] = 1

    def is_set(self) -> bool:
        """Whether nothing new may be begun."""
        return self._byte[0] == 1
