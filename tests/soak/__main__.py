"""The command: ``python -m tests.soak``."""

from __future__ import annotations

import json
import random
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import click
from kombu import pools

from celery_flows.worker.embedded import Processes
from tests.soak.brokers import BROKERS, open_broker
from tests.soak.databases import DATABASES, GIVEN, open_database
from tests.soak.report import Verdict
from tests.soak.run import Soak


@click.command()
@click.option("--minutes", type=click.FloatRange(min=0), default=5.0, show_default=True, help="How long to strike.")
@click.option("--seed", type=int, help="Repeats the monkey's choices; default: a new one, which is told.")
@click.option("--broker", type=click.Choice(BROKERS), default="embedded", show_default=True)
@click.option(
    "--database", type=click.Choice(DATABASES),
    help=f"A new database, removed in the end. Default: the one {GIVEN} names, which is kept; without it, sqlite.",
)  # fmt: skip
@click.option("--json", "report", type=click.Path(dir_okay=False, path_type=Path), help="Writes the verdict there.")
@click.option(
    "--keep", type=click.Path(file_okay=False, path_type=Path), help="Keeps logs and evidence in this new folder."
)
def main(
    minutes: float, seed: int | None, broker: str, database: str | None, report: Path | None, keep: Path | None
) -> None:
    """Runs flows of every kind while a monkey kills children and workers, stops processes, loses messages and cuts
    connections. Ends with a verdict, and exits 0 only if nothing was lost, nothing that was recorded ran again, and
    every history is whole."""
    chosen = seed if seed is not None else random.randrange(2**32)
    repeat = f"python -m tests.soak --minutes {minutes:g} --seed {chosen} --broker {broker}"
    repeat += f" --database {database}" if database else ""
    click.echo(f"seed {chosen}; to repeat the monkey's choices: {repeat}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    # A shell's background job ignores it, and so would our workers, until Celery has its handler in place.
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    verdict = soak(minutes * 60, chosen, broker, database, keep)
    for line in verdict.lines():
        click.echo(line)
    if report is not None:
        told = {"seed": chosen, "command": repeat, **verdict.as_json()}
        report.write_text(json.dumps(told, indent=2) + "\n")
    click.echo(f"{'WRONG' if verdict.wrongs else 'clean'}; to repeat: {repeat}")
    sys.exit(1 if verdict.wrongs else 0)


def soak(seconds: float, seed: int, broker_name: str, database_name: str | None, keep: Path | None) -> Verdict:
    """One soak from the making of its servers to their end."""
    with ExitStack() as stack:
        directory = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        processes = stack.enter_context(Processes(directory))
        database = stack.enter_context(open_database(database_name, directory))
        stack.callback(pools.reset)
        broker = stack.enter_context(open_broker(broker_name, processes))
        run = Soak(processes, broker, database, seed, say=click.echo)
        stack.callback(run.application.app.close)
        stack.callback(run.application.flows.store.close)
        stack.callback(run.close)
        stack.callback(signal.signal, signal.SIGINT, signal.SIG_IGN)  # what was begun is ended in any case
        return run.run(seconds)


if __name__ == "__main__":
    main()
