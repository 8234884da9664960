"""Retention, over each database, synchronous and awaited: what prune takes, and what it must leave."""

from __future__ import annotations

import pytest

from celery_flows.store import FlowStatus, InvalidData, pruning
from tests.support.samples import DAY, a_flow, a_step, ended, now
from tests.support.shells import Shell

OLD = now() - 40 * DAY


@pytest.mark.parametrize("status", [FlowStatus.FINISHED, FlowStatus.FAILED, FlowStatus.CANCELLED])
def test_prune_takes_old_terminal_flows_with_steps_and_events(shell: Shell, status: FlowStatus) -> None:
    shell.store.insert(flow := ended(40, status))
    shell.store.insert_step(step := a_step(flow.id))
    shell.store.append_event(flow.id, "noted", {})
    assert shell.store.prune_terminal_flows(30) == 1
    assert shell.store.get(flow.id) is None
    assert shell.store.get_step(step.id) is None
    assert shell.store.list_steps(flow.id) == []
    assert shell.store.list_events(flow.id) == []
    assert shell.store.prune_terminal_flows(30) == 0


@pytest.mark.parametrize("status", [FlowStatus.CREATED, FlowStatus.RUNNING, FlowStatus.WAITING])
def test_prune_leaves_open_flows_however_old(shell: Shell, status: FlowStatus) -> None:
    shell.store.insert(flow := a_flow(status=status, created_at=OLD, updated_at=OLD))
    shell.store.insert(reopened := ended(40))
    shell.store.update_with_revision(reopened.but(status=status))
    shell.store.insert(odd := a_flow(status=status, created_at=OLD, updated_at=OLD, finished_at=OLD))
    assert shell.store.prune_terminal_flows(0) == 0
    assert None not in [shell.store.get(known.id) for known in (flow, reopened, odd)]


def test_prune_leaves_what_ended_within_the_retention(shell: Shell) -> None:
    shell.store.insert(recent := ended(29.9))
    shell.store.insert(old := ended(30.1))
    assert shell.store.prune_terminal_flows(30) == 1
    assert shell.store.get(recent.id) is not None
    assert shell.store.get(old.id) is None


def test_a_retention_of_zero_days_takes_all_that_has_ended(shell: Shell) -> None:
    shell.store.insert(ended(0.001))
    assert shell.store.prune_terminal_flows(0) == 1


def test_a_retention_longer_than_time_takes_nothing(shell: Shell) -> None:
    shell.store.insert(ended(40))
    assert shell.store.prune_terminal_flows(10**7) == 0


def test_a_negative_retention_is_refused(shell: Shell) -> None:
    shell.store.insert(flow := ended(40))
    with pytest.raises(InvalidData) as caught:
        shell.store.prune_terminal_flows(-1)
    assert caught.value.field == "retain_days"
    assert shell.store.get(flow.id) is not None


def test_prune_keeps_a_child_until_its_parent_has_ended(shell: Shell) -> None:
    shell.store.insert(parent := a_flow(status=FlowStatus.WAITING, created_at=OLD, updated_at=OLD))
    shell.store.insert(child := ended(40, parent_flow_id=parent.id))
    assert shell.store.prune_terminal_flows(30) == 0
    shell.store.update_with_revision(parent.but(status=FlowStatus.FINISHED))
    assert shell.store.prune_terminal_flows(30) == 1
    assert shell.store.get(child.id) is None


def test_prune_takes_an_orphan(shell: Shell) -> None:
    shell.store.insert(ended(40, parent_flow_id=a_flow().id))
    assert shell.store.prune_terminal_flows(30) == 1


def test_prune_goes_on_batch_by_batch_past_what_it_must_leave(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    shell.store.insert(parent := a_flow(status=FlowStatus.WAITING))
    with shell.within("connection") as caller:
        for _ in range(5):
            caller.store.insert(ended(50, parent_flow_id=parent.id))
        for _ in range(7):
            caller.store.insert(ended(40))
        caller.commit()
    monkeypatch.setattr(pruning, "BATCH", 3)
    assert shell.store.prune_terminal_flows(30) == 7
    assert len(shell.store.list_by_status(FlowStatus.FINISHED)) == 5
