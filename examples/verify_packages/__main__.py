"""``python -m examples.verify_packages demo``: the audit and all it needs, and a worker killed in the middle."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from celery_flows import FlowError
from examples.verify_packages.audit import packages_folder
from examples.verify_packages.demo import run_demo


@click.group()
def main() -> None:
    """Audits the installed packages of a Python environment."""


@main.command()
@click.argument("environment", required=False)
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("verify-packages.json"),
    show_default=True,
    help="Where the report goes, as JSON.",
)
@click.option("--kill/--no-kill", default=True, show_default=True, help="Kill a worker with SIGKILL in the middle.")
def demo(environment: str | None, report: Path, kill: bool) -> None:
    """Audits ENVIRONMENT (a virtual environment or a folder of packages; default: the one this runs in).

    Starts two workers, and servers of its own unless FLOW_STORE_URL and CELERY_BROKER_URL are set. Ends with 0 if the
    flow finished, a worker was killed, and everything adds up.
    """
    try:
        if not report.parent.is_dir():
            raise FileNotFoundError(f"{report.parent}, where the report should go, is no folder")
        sys.exit(run_demo(packages_folder(environment), report, kill))
    except (FlowError, FileNotFoundError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
