"""What is seen of mirrored tasks, over each database: late words change nothing, what is gone stays gone."""

from __future__ import annotations

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa

from celery_flows.store import FlowManager, FlowMode, FlowStatus, FlowStep, FlowStepStatus, SqlFlowStore, mirrors
from celery_flows.store.audit import verify
from celery_flows.store.models import Flow
from celery_flows.store.observations import Observation, news
from celery_flows.store.tables import flow_dispatch, flows
from tests.support.fold import assert_whole
from tests.support.samples import NAMES

PENDING, RUNNING, SUCCEEDED = FlowStepStatus.PENDING, FlowStepStatus.RUNNING, FlowStepStatus.SUCCEEDED
FAILED, CANCELLED = FlowStepStatus.FAILED, FlowStepStatus.CANCELLED
CALLED: dict[str, Any] = {"parent_id": None}
DAY = 86_400.0


def create(store: SqlFlowStore, *planned: str) -> Flow:
    """A mirrored flow with planned steps, the first of them published."""
    flow = Flow(mode=FlowMode.MIRRORED, status=FlowStatus.RUNNING, **NAMES)
    steps = [
        Observation(flow.id, run_id, "task", PENDING, called=None if number else CALLED)
        for number, run_id in enumerate(planned)
    ]
    assert store.run(mirrors.create, flow, steps, DAY)
    return flow


def seen(flow: Flow, run_id: str, status: FlowStepStatus, attempt: int = 1, error: str | None = None) -> Observation:
    told = None if error is None else {"type": error, "message": ""}
    return Observation(flow.id, run_id, "task", status, attempt, told, CALLED)


def step_of(store: SqlFlowStore, flow: Flow, run_id: str) -> FlowStep:
    step = store.find_step_by_run_id(flow.id, run_id)
    assert step is not None
    return step


def make_due(store: SqlFlowStore, flow_id: UUID) -> None:
    past = sa.update(flow_dispatch).where(flow_dispatch.c.flow_id == flow_id)
    with store.engine.begin() as connection:
        connection.execute(past.values(due_at=datetime(2020, 1, 1, tzinfo=UTC)))


def assert_well(store: SqlFlowStore, flow: Flow) -> None:
    assert_whole(store, flow.id)
    assert list(verify(store, [flow.id])) == []


# A task that failed once, and was tried again; with what two processes may say twice.
STORY = (
    (PENDING, 1, None),
    (RUNNING, 1, None),
    (PENDING, 2, "First"),
    (RUNNING, 2, None),
    (SUCCEEDED, 2, None),
)


@pytest.mark.parametrize("seed", range(12))
def test_the_order_in_which_observations_come_in_changes_nothing_but_the_way(store: SqlFlowStore, seed: int) -> None:
    flow = create(store, "r")
    told = [*STORY, *STORY[:3]]
    random.Random(seed).shuffle(told)
    row = {"runtime": "mirrored", "status": "pending", "attempt": 1, "error_json": None, "args_json": CALLED}
    for status, attempt, error in told:
        observation = seen(flow, "r", status, attempt, error)
        row |= news(row, observation)  # what the rule says, and what the database makes of it
        store.run(mirrors.observe, [observation])
        step = step_of(store, flow, "r")
        assert {name: getattr(step, name) for name in row} == row
    assert (row["status"], row["attempt"], row["error_json"]) == (SUCCEEDED, 2, None)
    assert_well(store, flow)


def test_an_error_that_is_told_after_the_next_attempt_began_is_kept_until_it_succeeds(store: SqlFlowStore) -> None:
    flow = create(store, "r")
    store.run(mirrors.observe, [seen(flow, "r", RUNNING, 2)])
    store.run(mirrors.observe, [seen(flow, "r", PENDING, 2, "First")])
    step = step_of(store, flow, "r")
    assert (step.status, step.error_json) == (RUNNING, {"type": "First", "message": ""})
    assert_well(store, flow)


@pytest.mark.parametrize("first", [SUCCEEDED, FAILED, CANCELLED])
def test_the_first_terminal_status_stays(store: SqlFlowStore, first: FlowStepStatus) -> None:
    flow = create(store, "r")
    store.run(mirrors.observe, [seen(flow, "r", first)])
    for late in FlowStepStatus:
        assert store.run(mirrors.observe, [seen(flow, "r", late, attempt=9)]) == set()
    assert step_of(store, flow, "r").status is first
    assert_well(store, flow)


def test_a_late_observation_does_not_bring_back_a_pruned_flow(store: SqlFlowStore) -> None:
    flow = create(store, "r")
    store.run(mirrors.observe, [seen(flow, "r", SUCCEEDED)])
    assert store.run(mirrors.end_if_over, flow.id) is FlowStatus.FINISHED
    assert store.prune_terminal_flows(0) == 1
    for status in FlowStepStatus:
        assert store.run(mirrors.observe, [seen(flow, "r", status)]) == set()
    assert store.get(flow.id) is None
    assert store.list_steps(flow.id) == []


def test_a_managed_flow_and_its_steps_are_left_alone(store: SqlFlowStore) -> None:
    flow = FlowManager(store).create_managed(**NAMES)
    managed = FlowStep(flow_id=flow.id, run_id="r", task="task")
    store.insert_step(managed)
    for status, run_id in itertools.product(FlowStepStatus, ["r", "other"]):
        assert store.run(mirrors.observe, [seen(flow, run_id, status)]) == set()
    assert [(step.run_id, step.status) for step in store.list_steps(flow.id)] == [("r", PENDING)]
    assert store.run(mirrors.end_if_over, flow.id) is None


def test_an_ended_flow_takes_no_open_step_and_keeps_what_ended_late(store: SqlFlowStore) -> None:
    flow = create(store, "r")
    store.run(mirrors.observe, [seen(flow, "r", SUCCEEDED)])
    store.run(mirrors.end_if_over, flow.id)
    assert store.run(mirrors.observe, [seen(flow, "late", RUNNING)]) == set()
    assert store.run(mirrors.observe, [seen(flow, "late", SUCCEEDED)]) == {flow.id}
    assert_well(store, flow)


@pytest.mark.parametrize(
    ("statuses", "ends"),
    [
        ("", None),  # nothing is known yet
        ("p", None),
        ("s", FlowStatus.FINISHED),
        ("sss", FlowStatus.FINISHED),
        ("sp", None),  # the rest of a chain, or a chord's body, is yet to come
        ("fp", FlowStatus.FAILED),
        ("cp", FlowStatus.CANCELLED),
        ("fc", FlowStatus.FAILED),
        ("fr", None),  # members of a group go on when one has failed
        ("fq", None),
        ("cr", None),
    ],
)
def test_when_a_flow_is_over(store: SqlFlowStore, statuses: str, ends: FlowStatus | None) -> None:
    """p planned, q published, r running, s succeeded, f failed, c cancelled."""
    flow = create(store)
    meant = {"p": PENDING, "q": PENDING, "r": RUNNING, "s": SUCCEEDED, "f": FAILED, "c": CANCELLED}
    steps = [
        Observation(flow.id, str(number), "task", meant[letter], called=None if letter == "p" else CALLED)
        for number, letter in enumerate(statuses)
    ]
    store.run(mirrors.observe, steps)
    assert (flow.id in store.run(mirrors.without_live_steps, [flow.id])) == (not set(statuses) & {"q", "r"})
    assert store.run(mirrors.end_if_over, flow.id) is ends
    assert_well(store, flow)


def test_one_statement_takes_the_steps_of_many_flows(store: SqlFlowStore) -> None:
    made = [create(store, "r") for _ in range(3)]
    many = [seen(flow, run_id, RUNNING) for flow in made for run_id in ("r", "s", "t")]
    assert store.run(mirrors.observe, [*many, seen(Flow(**NAMES), "r", RUNNING)]) == {flow.id for flow in made}
    assert store.run(mirrors.observe, []) == set()
    for flow in made:
        assert [step.status for step in store.list_steps(flow.id)] == [RUNNING] * 3
        assert_well(store, flow)


def test_a_key_or_an_id_that_is_taken_makes_no_second_flow(store: SqlFlowStore) -> None:
    first = Flow(mode=FlowMode.MIRRORED, status=FlowStatus.RUNNING, idempotency_key="k", **NAMES)
    assert store.run(mirrors.create, first, [], DAY)
    for again in (first, first.but(id=uuid4())):
        assert not store.run(mirrors.create, again, [seen(again, "r", PENDING)], DAY)
    with store.engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(flows)) == 1
    assert store.list_steps(first.id) == []


def test_a_flow_of_which_nothing_is_seen_is_given_up_as_lost(store: SqlFlowStore) -> None:
    flow = create(store, "r", "planned")
    store.run(mirrors.observe, [seen(flow, "r", RUNNING)])
    make_due(store, flow.id)
    assert store.run(mirrors.look, flow.id, DAY) is None  # something was seen a moment ago
    with store.engine.connect() as connection:
        due_at = connection.scalar(sa.select(flow_dispatch.c.due_at).where(flow_dispatch.c.flow_id == flow.id))
    assert due_at is not None
    assert due_at > step_of(store, flow, "r").updated_at
    assert store.run(mirrors.look, flow.id, 0.0) is FlowStatus.FAILED
    stored = store.get(flow.id)
    assert stored is not None
    assert stored.error_json == {"type": "MirrorLost", "message": "nothing was seen of its tasks for 0 seconds"}
    assert [step.status for step in store.list_steps(flow.id)] == [CANCELLED, CANCELLED]
    assert_well(store, flow)


def test_a_flow_whose_end_was_missed_is_ended_by_the_next_look(store: SqlFlowStore) -> None:
    """Whoever closed its last step died before it looked."""
    flow = create(store, "r")
    store.run(mirrors.observe, [seen(flow, "r", SUCCEEDED)])
    assert store.run(mirrors.look, flow.id, DAY) is FlowStatus.FINISHED
    assert store.run(mirrors.look, flow.id, DAY) is None
    assert_well(store, flow)


def test_a_cancel_that_was_asked_for_decides_how_a_flow_ends(store: SqlFlowStore) -> None:
    flow = create(store, "r")
    FlowManager(store).request_cancel(flow.id)
    store.run(mirrors.observe, [seen(flow, "r", SUCCEEDED)])
    assert store.run(mirrors.end_if_over, flow.id) is FlowStatus.CANCELLED
    assert_well(store, flow)


def test_of_many_that_close_the_last_steps_at_once_one_ends_the_flow(store: SqlFlowStore) -> None:
    run_ids = [str(number) for number in range(8)]
    flow = create(store, *run_ids)
    store.run(mirrors.observe, [seen(flow, run_id, RUNNING) for run_id in run_ids])
    ended: list[FlowStatus | None] = []
    at_once = threading.Barrier(len(run_ids))

    def close(run_id: str) -> None:
        at_once.wait(10)
        store.run(mirrors.observe, [seen(flow, run_id, SUCCEEDED)])
        if flow.id in store.run(mirrors.without_live_steps, [flow.id]):
            ended.append(store.run(mirrors.end_if_over, flow.id))

    with ThreadPoolExecutor(len(run_ids)) as threads:
        list(threads.map(close, run_ids))
    assert [status for status in ended if status is not None] == [FlowStatus.FINISHED]
    assert_well(store, flow)
