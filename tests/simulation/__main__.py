"""``python -m tests.simulation``: plays seeds until one fails, and prints it; ``--seed N`` plays it again."""

from __future__ import annotations

import logging
import multiprocessing
import sys
import time

import click


@click.command()
@click.option("--seeds", type=click.IntRange(1), default=5000, show_default=True, help="How many.")
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="The first of them.")
@click.option("--seed", type=click.IntRange(0), help="Just this one, with its log.")
@click.option("--jobs", type=click.IntRange(1), default=multiprocessing.cpu_count(), show_default=True)
def main(seeds: int, first: int, seed: int | None, jobs: int) -> None:
    """Simulates workers, faults and time by seed, and checks every invariant after every transaction."""
    if seed is not None:
        failed = _play(seed)
        click.echo(failed or f"seed {seed} holds")
        sys.exit(failed is not None)
    began = time.monotonic()
    with multiprocessing.Pool(jobs) as pool:
        failures = [failed for failed in pool.imap_unordered(_play, range(first, first + seeds), 20) if failed]
    minutes = (time.monotonic() - began) / 60
    for failed in failures[:3]:
        click.echo(failed)
    click.echo(f"{seeds} seeds in {minutes:.1f} minutes ({seeds / minutes:.0f} a minute): {len(failures)} failed")
    sys.exit(bool(failures))


def _play(seed: int) -> str | None:
    from tests.simulation.run import Run
    from tests.simulation.world import Violation

    logging.disable(logging.CRITICAL)
    try:
        Run(seed).play()
    except Violation as violation:
        return f"seed {seed}: {violation}"
    return None


if __name__ == "__main__":
    main()
