"""The question before what cannot be undone."""

from __future__ import annotations

import sys

import click

from celery_flows.worker.lifecycle import Refused


def confirm(what: str, *, yes: bool) -> None:
    """Says nothing if the operator has said yes, or says so now.

    Raises:
        Refused: it has to be asked, and there is no terminal to ask on.
        click.Abort: the operator says no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise Refused(f"{what}, and there is no terminal to confirm it on: say --yes, too")
    click.confirm(f"{what}. Go on?", abort=True, err=True)
