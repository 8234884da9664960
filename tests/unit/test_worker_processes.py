"""Whose leases a worker's parent keeps: those of its running requests for flows, told apart by process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from celery_flows.tasks.runtime import worker_token
from celery_flows.worker.processes import held_by, is_alive


@dataclass(frozen=True)
class Request:
    """What of a Celery request matters."""

    id: str
    worker_pid: int | None
    type: str = "flows.drive"


def test_two_running_requests_of_one_id_are_two_holders() -> None:
    """A doubled message: each process claims for itself, and the death of one is not that of the other."""
    running = [Request("flow-1", 10), Request("flow-1", 11)]
    assert held_by(running) == {worker_token(10, "flow-1"): 10, worker_token(11, "flow-1"): 11}


def test_what_is_not_ours_or_not_begun_holds_nothing() -> None:
    running = [Request("a", 10, "users.task"), Request("b", None), Request("c", 12, "flows.step")]
    assert held_by(running) == {worker_token(12, "c"): 12}


def test_a_set_that_changes_while_it_is_looked_at_is_looked_at_again() -> None:
    class Changing:
        looks = 0

        def __iter__(self) -> Any:
            self.looks += 1
            if self.looks < 3:
                raise RuntimeError("Set changed size during iteration")
            return iter([Request("a", 10)])

    assert held_by(Changing()) == {worker_token(10, "a"): 10}


def test_a_process_that_was_not_waited_for_is_dead() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it has ended, and is a zombie
    assert not is_alive(child)
    os.waitpid(child, 0)
    assert not is_alive(child)
    assert is_alive(os.getpid())
    assert is_alive(os.getppid())
