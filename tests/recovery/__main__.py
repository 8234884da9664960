"""``python -m tests.recovery``: makes faults happen to real workers, and measures how long until their work goes on.

All durations are as shipped, those of a shop that sets none. Ctrl-C shows what was measured until then.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from tests.recovery.faults import FAULTS
from tests.recovery.proof import Broken, NotStruck, said
from tests.recovery.report import Line, surroundings, table
from tests.recovery.servers import BROKERS, DATABASES, forget_configuration, open_broker, open_database
from tests.recovery.stage import Stage
from tests.support.databases import Databases

INTERRUPTED = 130

_list = "\n\n".join(f"{fault.name}: {fault.what}." for fault in FAULTS.values())


@click.command(help=f"{__doc__}\n\nEach option may be given several times; without any, everything is run.\n\n{_list}")
@click.option("--fault", "faults", multiple=True, type=click.Choice(list(FAULTS)), help="Which faults; default: all.")
@click.option("--broker", "brokers", multiple=True, type=click.Choice(BROKERS), help="Default: all.")
@click.option("--database", "databases", multiple=True, type=click.Choice(DATABASES), help="Default: both.")
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="How often each line is played.")
@click.option("--json", "file", type=click.Path(path_type=Path, dir_okay=False), help="Writes the figures there, too.")
@click.option("--keep-logs", type=click.Path(path_type=Path, file_okay=False), help="What the workers said goes there.")
def main(
    faults: tuple[str, ...], brokers: tuple[str, ...], databases: tuple[str, ...], rounds: int, file: Path | None,
    keep_logs: Path | None,
) -> None:  # fmt: skip
    forget_configuration()
    lines = [
        Line(FAULTS[fault], broker, database, rounds)
        for fault in faults or FAULTS
        for broker in brokers or BROKERS
        for database in databases or DATABASES
        if database in FAULTS[fault].databases
    ]
    if not lines:
        raise click.UsageError("this fault is not one of this database")
    around = surroundings()
    settings = around.pop("settings")
    click.echo(", ".join(f"{name} {value}" for name, value in {**around, **settings}.items()))
    interrupted = _play_all(lines, keep_logs)
    click.echo(table([line for line in lines if line.played]))
    if file is not None:
        file.write_text(json.dumps({**surroundings(), "lines": [line.as_json() for line in lines]}, indent=2) + "\n")
    sys.exit(INTERRUPTED if interrupted else not all(line.is_good for line in lines))


def _play_all(lines: list[Line], keep_logs: Path | None) -> bool:
    """Plays one line after the other; gives whether somebody stopped it."""
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="celery-flows-") as scratch, _databases(Path(scratch)) as databases:
            for number, line in enumerate(lines, start=1):
                click.echo(f"[{number}/{len(lines)}] {line.name}: {line.command}")
                _play(line, databases, Path(scratch) / str(number), keep_logs)
    except KeyboardInterrupt:
        click.echo("stopped; everything that was started is gone", err=True)
        return True
    return False


def _interrupt(*_: object) -> None:
    """Stops once: what is given back after that is not to be interrupted."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def _databases(folder: Path) -> Iterator[Databases]:
    made = Databases(folder)
    try:
        yield made
    finally:
        made.close()


def _play(line: Line, databases: Databases, folder: Path, keep_logs: Path | None) -> None:
    folder.mkdir()
    with open_broker(line.broker, folder, own=line.fault.breaks_broker) as broker:
        for number in range(1, line.rounds + 1):
            began = time.monotonic()
            place = folder / f"round-{number}"
            place.mkdir()
            with open_database(line.database, databases, place) as url, Stage(broker, url, place) as stage:
                seconds, wrong = _round(line, stage)
                if keep_logs is not None:
                    _keep(stage, keep_logs / f"{line.name.replace(', ', '-')}-{number}.log")
            line.played += 1
            line.seconds += [] if seconds is None else [seconds]
            line.wrong += [] if wrong is None else [wrong]
            outcome = wrong or ("recovered" if seconds is None else f"recovered in {seconds:.2f} s")
            click.echo(f"    round {number} of {line.rounds}: {outcome} (took {time.monotonic() - began:.0f} s)")


def _round(line: Line, stage: Stage) -> tuple[float | None, str | None]:
    """One round's seconds, if it has any, and what went wrong, if anything did."""
    try:
        seconds = line.fault.strike(stage)
        stage.check()
    except NotStruck as none:
        return None, f"not struck: {none}"
    except Broken as broken:
        return None, f"broken: {broken}"
    except AssertionError as error:
        return None, f"error: {said(error)}"
    return seconds, None


def _keep(stage: Stage, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(stage.logs())


if __name__ == "__main__":
    main()
