"""The schema's history: up, down, and the same as the tables that the code speaks of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from celery_flows.store import (
    AsyncFlowStore,
    FlowManager,
    InvalidData,
    SchemaOutdated,
    SqlFlowStore,
    StoreError,
    schema,
)
from celery_flows.store.engines import make_async_engine, make_engine
from celery_flows.store.tables import metadata
from tests.support.samples import NAMES, a_step, ended


@pytest.fixture
def engine(empty_url: str) -> Iterator[sa.Engine]:
    made = make_engine(empty_url)
    yield made
    made.dispose()


def tables(engine: sa.Engine) -> set[str]:
    return set(sa.inspect(engine).get_table_names())


def test_up_makes_the_tables_and_down_takes_them_away(engine: sa.Engine) -> None:
    assert tables(engine) == set()
    schema.upgrade(engine)
    assert tables(engine) == {*metadata.tables, schema.VERSION_TABLE}
    with engine.connect() as connection:
        assert schema.current(connection) == schema.head()
    schema.downgrade(engine, "base")
    assert tables(engine) == {schema.VERSION_TABLE}
    schema.upgrade(engine)
    assert tables(engine) == {*metadata.tables, schema.VERSION_TABLE}


def test_the_migrated_schema_is_the_one_the_code_speaks_of(engine: sa.Engine) -> None:
    schema.upgrade(engine)
    with engine.connect() as connection:
        options = {"version_table": schema.VERSION_TABLE, "compare_type": True, "compare_server_default": False}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []


def test_checks_and_cascades_are_what_the_code_speaks_of(engine: sa.Engine) -> None:
    """What the comparison above does not look at."""
    schema.upgrade(engine)
    inspector = sa.inspect(engine)
    for table in metadata.tables.values():
        checks = {c.name for c in table.constraints if isinstance(c, sa.CheckConstraint)}
        assert {check["name"] for check in inspector.get_check_constraints(table.name)} == checks
        wanted = {key.constraint.name: key.ondelete for key in table.foreign_keys if key.constraint is not None}
        found = {key["name"]: key["options"].get("ondelete") for key in inspector.get_foreign_keys(table.name)}
        assert found == wanted
        partial = {index.name for index in table.indexes if index.dialect_options["postgresql"]["where"] is not None}
        where = {index["name"] for index in inspector.get_indexes(table.name) if conditions(index)}
        assert where == partial


def conditions(index: Any) -> bool:
    options = index.get("dialect_options", {})
    return any(options.get(f"{name}_where") is not None for name in ("postgresql", "sqlite"))


def test_statuses_are_text_with_a_check(engine: sa.Engine) -> None:
    schema.upgrade(engine)
    store = SqlFlowStore(engine)
    flow = FlowManager(store).create_managed(**NAMES)
    with pytest.raises(sa.exc.IntegrityError), engine.begin() as connection:
        connection.execute(sa.text("UPDATE flows SET status = 'RUNNING'"))
    assert store.get(flow.id) == flow


# ---- opening --------------------------------------------------------------------------------------------------------

COMMAND = "celery -A APP flow migrate"


def test_an_empty_database_is_refused_naming_the_command(engine: sa.Engine) -> None:
    with pytest.raises(SchemaOutdated) as caught:
        SqlFlowStore(engine)
    assert COMMAND in str(caught.value)
    assert (caught.value.found, caught.value.wanted) == (None, schema.head())
    assert tables(engine) == set(), "it only checks"


def test_a_schema_of_another_version_is_refused_naming_the_command(engine: sa.Engine) -> None:
    schema.upgrade(engine)
    with engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '0000'"))
    with pytest.raises(SchemaOutdated) as caught:
        SqlFlowStore(engine)
    assert COMMAND in str(caught.value)
    assert caught.value.found == "0000"
    assert "0000" in str(caught.value)


def test_opening_migrates_and_opening_again_is_quick_and_harmless(empty_url: str) -> None:
    first = SqlFlowStore.open(empty_url)
    flow = FlowManager(first).create_managed(**NAMES)
    began = time.monotonic()
    second = SqlFlowStore.open(empty_url)
    assert time.monotonic() - began < 2
    assert second.get(flow.id) == flow
    first.close()
    second.close()


def test_the_async_store_opens_and_checks_alike(empty_url: str) -> None:
    async def refused() -> None:
        store = AsyncFlowStore(make_async_engine(empty_url))
        with pytest.raises(SchemaOutdated):
            await store.check()
        await store.close()

    async def opened() -> None:
        store = await AsyncFlowStore.open(empty_url)
        assert await store.list_by_owner("nobody") == []
        await store.close()

    asyncio.run(refused())
    asyncio.run(opened())


def test_every_connection_of_an_opened_store_keeps_foreign_keys(empty_url: str) -> None:
    """Also the one that migrated: without them a pruned flow would leave its steps behind."""
    store = SqlFlowStore.open(empty_url)
    for _ in range(3):
        store.insert(flow := ended(40))
        store.insert_step(step := a_step(flow.id))
        assert store.prune_terminal_flows(30) == 1
        assert store.get_step(step.id) is None
    store.close()


def test_a_database_that_cannot_be_reached_is_a_store_error() -> None:
    with pytest.raises(StoreError) as caught:
        SqlFlowStore(make_engine("postgresql://nobody:secret@127.0.0.1:1/none"))
    assert isinstance(caught.value.__cause__, sa.exc.OperationalError)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["mysql://u:secret@h/d", "postgresql+psycopg2://u:secret@h/d", "secret", ""])
def test_a_url_that_is_none_of_ours_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(InvalidData) as caught:
        make_engine(url)
    assert caught.value.field == "flow_store_url"
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["postgresql://h/d", "postgres://h/d", "postgresql+psycopg://h/d"])
def test_one_url_serves_both_shells(url: str) -> None:
    assert make_engine(url).dialect.driver == "psycopg"
    assert make_async_engine(url).dialect.is_async
