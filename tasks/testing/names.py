"""Names of steps, as a test writes them."""

from __future__ import annotations


def is_meant(name: str, wanted: str) -> bool:
    """Whether ``wanted`` names this step, task or flow definition; of a task's name the last part is enough."""
    return wanted in (name, name.rpartition(".")[2])
