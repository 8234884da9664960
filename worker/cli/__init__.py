"""``celery -A APP flow …``: the operator's commands, found by Celery through an entry point.

Exit codes: 0 done; 1 it could not be done (no such flow, database out of reach, schema outdated, or you said no);
2 the command was wrong (unknown flow definition, input that is no JSON or of the wrong type, a bad setting, or nobody
there to confirm it). docs/reference/cli.md has it all.
"""

from __future__ import annotations

import click

from celery_flows.worker.cli.cancel import cancel
from celery_flows.worker.cli.chores import prune, sweep, verify
from celery_flows.worker.cli.doctor import doctor
from celery_flows.worker.cli.emit import approve, emit
from celery_flows.worker.cli.going_back import fork, retry
from celery_flows.worker.cli.list import list_
from celery_flows.worker.cli.migrate import migrate
from celery_flows.worker.cli.pause import pause, resume, unpause
from celery_flows.worker.cli.show import show
from celery_flows.worker.cli.start import start
from celery_flows.worker.cli.stats import stats
from celery_flows.worker.cli.tail import tail


@click.group(name="flow")
def flow() -> None:
    """Durable flows: start, watch and steer them.

    They are those of the app that is named to celery itself:

    \b
    celery -A APP flow COMMAND

    Exit codes: 0 done, 1 it could not be done, 2 the command was wrong.
    """


for each in (
    start, list_, show, tail, cancel, pause, unpause, resume, retry, fork, emit, approve, prune, sweep, verify, doctor,
    migrate, stats,
):  # fmt: skip
    flow.add_command(each)
