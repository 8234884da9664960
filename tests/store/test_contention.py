"""A crowd on one flow, and two processes on one fresh database: everybody gets through, nothing happens twice."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from celery_flows.store import AlreadyTerminal, Flow, FlowManager, FlowStatus, FlowStepStatus, SqlFlowStore
from tests.support.crowd import at_once
from tests.support.fold import assert_whole
from tests.support.samples import NAMES

CROWD = 100


def test_a_crowd_of_writers_on_one_flow_all_succeed(store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    flow = manager.create_managed(**NAMES)
    came = at_once([partial(manager.update_state, flow.id, {f"writer-{n}": n}) for n in range(CROWD)])
    assert [error for error in came if not isinstance(error, Flow)] == []
    stored = manager.get(flow.id)
    assert stored.revision == CROWD + 1
    assert stored.state_json == {f"writer-{n}": n for n in range(CROWD)}
    assert len(assert_whole(store, flow.id)) == CROWD + 1


def test_a_crowd_that_finishes_and_cancels_ends_the_flow_once(store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    flow = manager.create_mirrored(**NAMES)
    came = at_once([partial(manager.finish, flow.id), partial(manager.cancel, flow.id)] * 15)
    assert len([won for won in came if isinstance(won, Flow)]) == 1
    assert len([lost for lost in came if isinstance(lost, AlreadyTerminal)]) == 29
    kinds = [event.kind for event in assert_whole(store, flow.id)]
    assert kinds in (["created", "finished"], ["created", "cancelled"])
    assert manager.get(flow.id).status in (FlowStatus.FINISHED, FlowStatus.CANCELLED)


def test_a_crowd_of_observations_of_one_run_makes_one_step(store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    flow = manager.create_mirrored(**NAMES)
    seen = partial(manager.record_step_observation, flow_id=flow.id, run_id="r", task="t")
    statuses = [FlowStepStatus.RUNNING, FlowStepStatus.SUCCEEDED, FlowStepStatus.FAILED] * 10
    came = at_once([partial(seen, status=status) for status in statuses])
    assert [error for error in came if isinstance(error, Exception)] == []
    (step,) = manager.list_steps(flow.id)
    closing = [e for e in assert_whole(store, flow.id) if e.payload_json.get("step", {}).get("status") == step.status]
    assert step.status.is_terminal
    assert len(closing) == 1


def test_two_starts_with_one_key_make_one_flow(store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    came = at_once([partial(manager.create_managed, **NAMES, idempotency_key="k")] * 20)
    (won,) = [flow for flow in came if isinstance(flow, Flow)]
    assert manager.list_by_owner(won.owner_session_key) == [won]


MIGRATE = """
import sys
from celery_flows.store import SqlFlowStore
print("ready", flush=True)
sys.stdin.readline()
SqlFlowStore.open(sys.argv[1]).close()
"""


def test_several_processes_may_migrate_a_fresh_database_at_once(empty_url: str) -> None:
    with processes([sys.executable, "-c", MIGRATE, empty_url], count=3) as racers:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        assert [racer.wait(30) for racer in racers] == [0, 0, 0]


@contextmanager
def processes(command: list[str], *, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """The same command several times; what still runs at the end is killed."""
    pipe = subprocess.PIPE
    running = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(count)]
    try:
        yield running
    finally:
        for process in running:
            with process:
                process.kill()
