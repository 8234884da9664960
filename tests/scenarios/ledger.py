"""A bank that keeps a reference once, as payment providers do: what the scenarios' steps have their effects on."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

LEDGER = "SCENARIO_LEDGER"  # where it is, for all processes


class Ledger:
    """Entries in a file of its own, beside the flows' database."""

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path or os.environ[LEDGER])

    def book(self, reference: str, account: str, cents: int) -> str:
        """Books an entry; one of this reference that is there stays as it is."""
        with closing(sqlite3.connect(self.path, timeout=10)) as connection, connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS entries (reference TEXT PRIMARY KEY, account TEXT, cents INT)"
            )
            connection.execute("INSERT OR IGNORE INTO entries VALUES (?, ?, ?)", (reference, account, cents))
        return reference

    def balance(self, account: str) -> int:
        """What has been booked."""
        with closing(sqlite3.connect(self.path, timeout=10)) as connection:
            query = "SELECT coalesce(sum(cents), 0) FROM entries WHERE account = ?"
            return int(connection.execute(query, (account,)).fetchone()[0])
