"""A process that stands still inside a transaction: it sends itself SIGSTOP right before COMMIT, as if the machine had
frozen just then."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tests.support.shop import Shop

ARMED = "SHOP_ARMED"  # a folder; each file in it names a statement, and strikes once


def arm(shop: Shop, folder: Path) -> None:
    """Has the process that next commits a transaction with such a statement stand still before it does.

    It leaves ``stands still in NAME`` in the effect log, with its session's process id where the database has one.
    """
    engine = shop.flows.store.engine

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.info["written"] = []

    @sa.event.listens_for(engine, "after_cursor_execute")
    def note(connection: sa.Connection, _cursor: Any, statement: str, *_: Any) -> None:
        connection.info.setdefault("written", []).append(" ".join(statement.split()))

    @sa.event.listens_for(engine, "commit")
    def commit(connection: sa.Connection) -> None:
        if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
            return  # each statement has committed already
        written = connection.info["written"]
        if (name := next((file.name for file in sorted(folder.iterdir()) if _takes(file, written)), None)) is not None:
            info = getattr(connection.connection.dbapi_connection, "info", None)
            shop.effects.append(f"stands still in {name}", backend=getattr(info, "backend_pid", None))
            os.kill(os.getpid(), signal.SIGSTOP)


def _takes(file: Path, written: list[str]) -> bool:
    """Whether the file names one of these statements, and this process is the one that it strikes."""
    try:
        statement = file.read_text()
        if not any(statement in each for each in written):
            return False
        file.unlink()
    except FileNotFoundError:  # another process was quicker
        return False
    return True
