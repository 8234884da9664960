"""A short soak, as ``make soak`` runs a long one: faults of several kinds really strike, and the verdict is clean."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from tests.soak.monkey import Fault, strikes
from tests.soak.verdict import WRONGS
from tests.support.commandline import ROOT, environment
from tests.support.databases import VARIABLE, choose_server

MINUTES, SEED = 0.25, 108
SECONDS = 110  # within which all of it must be over


def database_exists(name: str) -> bool:
    engine = sa.create_engine(choose_server().url, poolclass=NullPool)
    with engine.connect() as connection:
        return bool(
            connection.scalar(sa.text("SELECT count(*) FROM pg_database WHERE datname = :name"), {"name": name})
        )


def processes_of(folder: Path) -> list[int]:
    """The processes that were told of this folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if str(folder).encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(int(pid))
    return found


def test_a_short_soak_is_clean_and_leaves_nothing_behind(tmp_path: Path) -> None:
    settings = {key: os.environ[key] for key in (VARIABLE,) if key in os.environ}
    settings |= {"FLOW_REPUBLISH_SECONDS": "1"}  # so that what is lost at the end is not waited for
    report, folder = tmp_path / "verdict.json", tmp_path / "soak"
    command = [sys.executable, "-m", "tests.soak", "--minutes", str(MINUTES), "--seed", str(SEED)]
    command += ["--database", "postgresql", "--json", str(report), "--keep", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**settings), capture_output=True, text=True, timeout=SECONDS, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"seed {SEED};" in done.stdout.splitlines()[0]
    verdict = json.loads(report.read_text())
    assert verdict["clean"]
    assert verdict["counts"] == dict.fromkeys(WRONGS, 0)
    assert sum(verdict["ended"].values()) == verdict["started"] >= 20
    assert verdict["bodies"] >= verdict["started"]

    struck = [strike["fault"] for strike in verdict["strikes"]]
    possible = [fault for fault in Fault if fault is not Fault.DATABASE_RESTARTED]
    planned = [strike.fault for strike in itertools.islice(strikes(SEED, possible, 2), len(struck))]
    assert struck == planned, "the seed's choices"
    assert len({strike["fault"] for strike in verdict["strikes"] if strike["hit"]}) >= 3
    assert verdict["recovery"]["overall"]["rows"] > 0

    database = sa.make_url(verdict["database"]).database
    assert database is not None
    assert not database_exists(database)
    assert processes_of(folder) == []
