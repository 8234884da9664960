"""The guard in front of tasks: what is no body of a task message is dropped, and each task keeps its own strategy."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from celery_flows.worker.guard import guard_tasks, is_well_formed

WELL_FORMED: list[Any] = [
    [[], {}, {}],
    ((), {}, {}),
    [[1, "a"], {"k": 1}, {"callbacks": None}],
    {"task": "t", "args": [], "kwargs": {}},
    {"task": "t", "args": (), "kwargs": {}, "id": "x", "retries": 0},
]
MALFORMED: list[Any] = [
    None, True, 7, "", "hello", b"raw", [], {}, [1, 2, 3], [[], {}], [[], {}, {}, {}], [{}, [], {}], ["", {}, {}],
    [[], {}, None], [None, {}, {}], [[], [], {}], {"task": "t"}, {"task": "t", "args": [], "kwargs": []},
    {"task": "t", "args": "ab", "kwargs": {}}, {"task": 7, "args": [], "kwargs": {}}, {"args": [], "kwargs": {}},
]  # fmt: skip


@pytest.mark.parametrize("payload", WELL_FORMED, ids=repr)
def test_the_body_of_a_task_message_is_let_through(payload: Any) -> None:
    assert is_well_formed(payload)


@pytest.mark.parametrize("payload", MALFORMED, ids=repr)
def test_anything_else_is_not(payload: Any) -> None:
    assert not is_well_formed(payload)


def nothing() -> None:
    """A task's body."""


class Message:
    """What a consumer hands to a strategy."""

    def __init__(self, payload: Any) -> None:
        self.payload, self.rejected = payload, 0

    def reject_log_error(self, logger: Any, errors: Any) -> None:
        self.rejected += 1


class Consumer:
    connection_errors = (OSError,)


def test_each_task_keeps_its_own_strategy_behind_the_guard(caplog: pytest.LogCaptureFixture) -> None:
    received: list[tuple[str, Any]] = []

    def own(task: Any, app: Celery, consumer: Any, **options: Any) -> Any:
        return lambda message, body, ack, reject, callbacks, **more: received.append((options["how"], body))

    app = Celery("guarded", broker="memory://", set_as_current=False)
    decorator: Any = app.task(name="own", shared=False, Strategy=staticmethod(own))
    task: Any = decorator(nothing)
    untouched = {name: each.Strategy for name, each in app.tasks.items() if name != "own"}
    guard_tasks(app)
    guard_tasks(app)  # as when a second worker is made in this process
    assert all(app.tasks[name].Strategy is not strategy for name, strategy in untouched.items())
    receive = task.Strategy(task, app, Consumer(), how="its own way")
    good, bad = Message([[1], {}, {}]), Message("hunter2")
    receive(good, "body", None, None, [])
    receive(bad, "hunter2", None, None, [])
    assert received == [("its own way", "body")]
    assert (good.rejected, bad.rejected) == (0, 1)
    assert "malformed message for own is dropped" in caplog.text
    assert "hunter2" not in caplog.text
