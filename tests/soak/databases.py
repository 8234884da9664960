"""The soak's database: a new one of its own, or the one that is given."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from celery_flows import SqlFlowStore
from tests.support.databases import Databases
from tests.support.own_postgresql import OwnPostgresql

DATABASES = ("sqlite", "postgresql", "own-postgresql")
GIVEN = "FLOW_STORE_URL"


@dataclass(frozen=True)
class SoakDatabase:
    """A migrated database, and how its server is restarted, if that is the soak's own."""

    url: str
    restart: Callable[[], tuple[int, int]] | None = None  # gives the server's process before and after


@contextmanager
def open_database(kind: str | None, directory: Path) -> Iterator[SoakDatabase]:
    """A new database, gone in the end; None: the one that ``FLOW_STORE_URL`` names, which is kept, else SQLite."""
    given = os.environ.pop(GIVEN, None)  # it would win over what the workers are told
    if kind is None and given is not None:
        SqlFlowStore.open(given).close()
        yield SoakDatabase(given)
    elif kind == "own-postgresql":
        server = OwnPostgresql()
        try:
            yield SoakDatabase(server.new_database(), lambda: restart(server))
        finally:
            server.close()
    else:
        databases = Databases(directory)
        made = databases.postgresql() if kind == "postgresql" else databases.sqlite(directory / "flows.sqlite")
        try:
            with made as url:
                yield SoakDatabase(url)
        finally:
            databases.close()


def restart(server: OwnPostgresql) -> tuple[int, int]:
    """Ends the server and its sessions at once and starts it again."""
    before = server.postmaster
    server.restart()
    return before, server.postmaster
