"""Engines: from a URL to connections with bounds on everything that could hang."""

from __future__ import annotations

from types import ModuleType

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from celery_flows.store import postgresql, sqlite
from celery_flows.store.errors import InvalidData


def dialect_of(engine: sa.Engine) -> ModuleType:
    """The module of what this engine's database does its own way.

    Raises:
        InvalidData: for any other database.
    """
    modules = {"postgresql": postgresql, "sqlite": sqlite}
    if engine.dialect.name not in modules:
        raise InvalidData("flow_store_url", f"names {engine.dialect.name}; the store speaks postgresql and sqlite")
    if engine.dialect.name == "postgresql" and engine.dialect.driver != "psycopg":
        raise InvalidData("flow_store_url", "must use psycopg 3: postgresql+psycopg://…")
    return modules[engine.dialect.name]


def parse_url(url: str | sa.URL) -> sa.URL:
    """The URL with our drivers filled in: psycopg 3 for ``postgresql://`` and ``postgres://``.

    Raises:
        InvalidData: it is no database URL. The message does not repeat it: it may hold a password.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise InvalidData("flow_store_url", "is not a database URL, e.g. postgresql://user@host/name") from None
    name = parsed.drivername
    if name in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if name not in ("postgresql+psycopg", "sqlite", "sqlite+pysqlite", "sqlite+aiosqlite"):
        raise InvalidData("flow_store_url", f"names {name}; write postgresql://… or sqlite:///file")
    return parsed


def make_engine(url: str | sa.URL) -> sa.Engine:
    """An engine for this URL, with bounds on everything that could hang."""
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        engine = sa.create_engine(parsed.set(drivername="sqlite"), **sqlite.engine_options())
        sqlite.prepare(engine)
        return engine
    return sa.create_engine(parsed, **postgresql.engine_options())


def make_async_engine(url: str | sa.URL) -> AsyncEngine:
    """:func:`make_engine` for asyncio, from the same URL."""
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        engine = create_async_engine(parsed.set(drivername="sqlite+aiosqlite"), **sqlite.engine_options())
        sqlite.prepare(engine.sync_engine)
        return engine
    return create_async_engine(parsed, **postgresql.engine_options())
