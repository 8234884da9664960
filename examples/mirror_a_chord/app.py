"""An application of Celery alone, but for two lines: the setting, and ``Flows(app)``."""

from __future__ import annotations

from typing import Any

from celery import Celery, Task, chord

from celery_flows import Flows

app = Celery("mirror_a_chord")
app.conf.update(task_default_queue="mirror-a-chord", worker_prefetch_multiplier=1, flow_mirror=True)
flows = Flows(app)


@app.task(bind=True, max_retries=3)
def count_words(self: Task[Any, int], text: str) -> int:
    """Counts the words of a text; the longest takes two attempts."""
    words = text.split()
    if len(words) > 5 and self.request.retries == 0:
        raise self.retry(exc=ValueError("too long for a first attempt"), countdown=0)
    return len(words)


@app.task
def add(counts: list[int]) -> int:
    """The chord's body."""
    total = sum(counts)
    announce.delay(total)
    return total


@app.task
def announce(total: int) -> None:
    """Published by a task, so nobody knows of it before."""


def count_all(texts: list[str]) -> Any:
    """The canvas, as it always was."""
    return chord((count_words.s(text) for text in texts), add.s())
