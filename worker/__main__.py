"""``celery-flows``: what needs no app of yours. Everything else is ``celery -A APP flow …``."""

from __future__ import annotations

import click

from celery_flows.worker.dev import dev


@click.group()
@click.version_option(package_name="celery-flows")
def main() -> None:
    """Durable flows on Celery. With an app of yours: celery -A APP flow --help."""


main.add_command(dev)

if __name__ == "__main__":
    main()
