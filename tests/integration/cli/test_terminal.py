"""At a terminal: tables, questions, bars. Those are pseudo terminals of a known width."""

from __future__ import annotations

import re

import sqlalchemy as sa

from celery_flows import FlowManager, FlowStatus, SqlFlowStore
from celery_flows.store.tables import flows
from tests.integration.cli.shop import a_flow
from tests.support.commandline import CELERY, Project

FLOW = (*CELERY, "-A", "shop", "flow")


def plain(shown: str) -> list[str]:
    """The lines of a screen, without colours."""
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "").split("\n")]


def test_a_table_is_aligned_and_its_statuses_coloured(project: Project, store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    failed, running = a_flow(manager), a_flow(manager, "a/b")
    manager.fail(failed, "no more boxes")

    code, shown = project.on_terminal(*FLOW, "list", columns=120)

    assert code == 0
    head, first, second, _ = plain(shown)
    assert head.split() == ["id", "flow", "status", "step", "owner", "updated"]
    assert (first.index("a/b"), second.index("orders/import")) == (head.index("flow"), head.index("flow"))
    assert first.startswith(str(running))
    assert "\x1b[1;31mfailed\x1b[0m" in shown


def test_no_color_is_heeded(project: Project, store: SqlFlowStore) -> None:
    a_flow(FlowManager(store))

    by_option = project.on_terminal(*CELERY, "--no-color", "-A", "shop", "flow", "list")[1]
    by_environment = project.but(NO_COLOR="1").on_terminal(*FLOW, "list")[1]

    assert "[36m" not in by_option + by_environment
    assert "[1;36m" in project.on_terminal(*FLOW, "list")[1]


def test_prune_asks_before_it_deletes_and_heeds_a_no(project: Project, store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    flow_id = a_flow(manager)
    manager.finish(flow_id)
    with store.engine.begin() as connection:
        connection.execute(sa.update(flows).values(finished_at=sa.text("'2020-01-01 00:00:00.000000'")))

    code, shown = project.on_terminal(*FLOW, "prune", typed="n\n")
    assert (code, store.get(flow_id) is not None) == (1, True)
    assert "This deletes 1 flows that are past their retention, with their histories. Go on? [y/N]" in shown

    code, shown = project.on_terminal(*FLOW, "prune", typed="y\n")
    assert (code, store.get(flow_id)) == (0, None)
    assert plain(shown)[-2] == "1 flows pruned"


def test_many_are_cancelled_only_after_a_yes(project: Project, store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    ids = [a_flow(manager) for _ in range(3)]

    code, shown = project.on_terminal(*FLOW, "cancel", "--flow", "orders/import", typed="y\n")

    assert code == 0
    assert "This asks 3 flows to cancel. Go on?" in shown
    assert all(manager.get(each).cancel_requested for each in ids)


def test_the_tables_are_taken_away_only_after_a_yes(project: Project, store: SqlFlowStore) -> None:
    a_flow(FlowManager(store))

    code, _ = project.on_terminal(*FLOW, "migrate", "--to", "base", typed="n\n")

    assert code == 1
    assert len(store.list_by_status(FlowStatus.RUNNING)) == 1


def test_a_long_chore_shows_how_far_it_has_come_and_leaves_only_its_answer(
    project: Project, store: SqlFlowStore
) -> None:
    manager = FlowManager(store)
    for _ in range(3):
        a_flow(manager)

    code, shown = project.on_terminal(*FLOW, "verify")

    assert code == 0
    assert "verifying" in shown
    assert [line for line in plain(shown) if "findings" in line] == ["3 flows, 0 findings"]
    assert "verifying" not in project.flow("verify").stderr
