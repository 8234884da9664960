"""Rules of the tables that no database checks for us."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from celery_flows.store import Flow, FlowEvent, FlowStep
from celery_flows.store.tables import EVENT_COLUMNS, FLOW_COLUMNS, flow_events, flow_steps, flows, metadata

HOT = {"updated_at", "revision", "current_step"}
TABLES = pytest.mark.parametrize("table", metadata.sorted_tables, ids=lambda table: table.name)


@TABLES
def test_no_index_names_a_column_that_the_record_of_a_step_changes(table: sa.Table) -> None:
    """Not even in its condition: PostgreSQL could then not update the row in place."""
    for index in table.indexes:
        condition = str(index.dialect_options["postgresql"]["where"])
        assert not HOT & {column.name for column in index.columns}, index.name
        assert not [name for name in HOT if name in condition], index.name
    if table is not flow_events:  # append-only: nothing is updated there
        uniques = [c for c in table.constraints if isinstance(c, sa.UniqueConstraint)]
        assert not [c for c in uniques if HOT & {column.name for column in c.columns}]


def test_identities_are_unique() -> None:
    def uniques(table: sa.Table) -> set[tuple[str, ...]]:
        found = [c for c in table.constraints if isinstance(c, sa.UniqueConstraint)]
        return {tuple(column.name for column in c.columns) for c in found}

    assert ("flow_id", "run_id") in uniques(flow_steps)
    assert ("flow_id", "revision") in uniques(flow_events)
    assert ("controller_id", "idempotency_key") in uniques(flows)


@TABLES
def test_what_belongs_to_a_flow_goes_with_it(table: sa.Table) -> None:
    for key in table.foreign_keys:
        assert key.target_fullname == "flows.id"
        assert key.ondelete == "CASCADE"


def test_every_field_of_a_record_has_its_column() -> None:
    assert set(Flow.model_fields) == {column.name for column in FLOW_COLUMNS}
    assert set(FlowStep.model_fields) == set(flow_steps.c.keys())
    assert set(FlowEvent.model_fields) == {column.name for column in EVENT_COLUMNS}


@TABLES
def test_names_fit_into_postgresql(table: sa.Table) -> None:
    names = [table.name, *(str(each.name) for each in table.indexes), *(str(each.name) for each in table.constraints)]
    assert all(len(name) <= 63 for name in names)
