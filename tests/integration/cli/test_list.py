"""``flow list``."""

from __future__ import annotations

import json
from datetime import timedelta
from uuid import UUID

from celery_flows import FlowManager, SqlFlowStore
from tests.integration.cli.shop import a_flow
from tests.support.commandline import CELERY, Project


def test_list_filters_and_turns_pages(project: Project, store: SqlFlowStore) -> None:
    manager = FlowManager(store)
    made = [a_flow(manager, owner="ada" if number % 2 else "bob") for number in range(5)]
    other = a_flow(manager, "orders/export")
    manager.finish(made[0])

    def listed(*options: str) -> list[UUID]:
        return [UUID(row["id"]) for row in json.loads(project.done("list", "--json", *options))["flows"]]

    assert listed() == [other, *made[::-1]]
    assert listed("--status", "finished") == [made[0]]
    assert listed("--owner", "bob", "--flow", "orders/import") == made[4::-2]
    assert listed("--limit", "4") == [other, *made[:1:-1]]
    assert listed("--limit", "4", "--after", str(made[2])) == made[1::-1]
    assert listed("--owner", "nobody") == []
    kept = manager.create_managed(controller_id="orders/keyed", owner_session_key="ada", idempotency_key="k")
    assert listed("--key", "k") == [kept.id]
    later = (kept.created_at + timedelta(seconds=1)).strftime("%Y-%m-%dT%H:%M:%S")
    assert listed("--since", later) == []
    assert listed("--until", later, "--limit", "2") == [kept.id, other]


def test_list_says_how_the_next_page_is_had_until_the_last(project: Project, store: SqlFlowStore) -> None:
    made = [a_flow(FlowManager(store)) for _ in range(5)]

    shown: list[UUID] = []
    after: list[str] = []
    for _ in range(3):
        page = project.flow("list", "--limit", "2", *after)
        shown += [UUID(line.split("\t")[0]) for line in page.stdout.splitlines()[1:]]
        after = page.stderr.split()[-2:]

    assert shown == made[::-1]
    assert page.stderr == ""
    assert json.loads(project.done("list", "--limit", "2", "--json"))["next"] == str(made[3])
    assert json.loads(project.done("list", "--limit", "5", "--json"))["next"] is None


def test_times_can_be_given_as_they_are_shown_or_as_how_long_ago(project: Project, store: SqlFlowStore) -> None:
    a_flow(FlowManager(store))
    shown = project.done("list").splitlines()[1].split("\t")[-1]

    def count(*options: str) -> int:
        return len(project.done("list", *options).splitlines()) - 1

    assert (count("--since", "2h"), count("--until", "2h")) == (1, 0)
    assert count("--since", "9999999d") == 1
    assert count("--until", shown, "--since", "2020-01-01") in (0, 1)
    assert count("--since", "2020-01-01T00:00:00+02:00", "--until", "2100-01-01") == 1


def test_an_empty_list_says_so_and_what_name_may_be_meant(project: Project, store: SqlFlowStore) -> None:
    assert project.flow("list").stderr == "no flow fits\n"
    assert project.flow("list", "--flow", "shop/helo").stderr == "no flow fits; did you mean 'shop/hello'?\n"


def test_list_in_a_pipe_is_a_line_a_flow_with_its_cells_parted_by_tabs(project: Project, store: SqlFlowStore) -> None:
    hostile = a_flow(FlowManager(store), owner="tab\tnewline\nescape\x1b[31m [/red]")

    head, row = project.done("list").splitlines()

    assert head.split("\t") == ["id", "flow", "status", "step", "owner", "updated"]
    cells = row.split("\t")
    assert cells[:3] == [str(hostile), "orders/import", "running"]
    assert cells[4] == r"tab\tnewline\nescape\x1b[31m [/red]"


def test_list_on_a_narrow_terminal_cuts_nothing(project: Project, store: SqlFlowStore) -> None:
    hostile = a_flow(FlowManager(store), "orders/" + "long" * 20, owner="escape\x1b[31m [/red]")

    code, shown = project.on_terminal(*CELERY, "-A", "shop", "flow", "list", columns=40)

    assert code == 0
    (row,) = (line for line in shown.splitlines() if str(hostile) in line)
    assert "orders/" + "long" * 20 in row
    assert r"escape\x1b[31m [/red]" in row


def test_an_app_without_flows_of_its_own_can_be_looked_at(project: Project, store: SqlFlowStore) -> None:
    flow_id = a_flow(FlowManager(store))

    assert str(flow_id) in project.done("list", app="plain")
