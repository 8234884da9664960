"""The examples, as a stranger runs them: on servers of their own, and on given ones. The mirrored chord and the demo
have files of their own."""

from __future__ import annotations

import re
import sys
from subprocess import CompletedProcess

import pytest

from tests.support.brokers import Broker
from tests.support.commandline import ROOT, Project


def run(example: str, **settings: str) -> CompletedProcess[str]:
    ended = Project(ROOT, settings).run(sys.executable, "-W", "error", "-m", f"examples.{example}")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended


def said(example: str, request: pytest.FixtureRequest, servers: str) -> list[str]:
    if servers == "its own":
        return run(example).stdout.splitlines()
    broker: Broker = request.getfixturevalue("redis_server")
    urls = {"FLOW_STORE_URL": request.getfixturevalue("postgresql_url"), "CELERY_BROKER_URL": broker.url}
    return run(example, **urls).stdout.splitlines()


either = pytest.mark.parametrize("servers", ["its own", "PostgreSQL and Redis"])


@either
def test_orders_are_sent_approved_and_undone(servers: str, request: pytest.FixtureRequest) -> None:
    lines = said("order_fulfilment", request, servers)
    sent = [f"sent: a {thing} to Elm Street {number}" for number in (1, 2) for thing in ("chair", "table")]
    assert lines[:5] == [*sent, "order-3 failed: StepFailed"]
    assert lines[-2:] == ["  refund: succeeded", "  release: succeeded"]


@either
def test_nights_are_reported(servers: str, request: pytest.FixtureRequest) -> None:
    lines = said("nightly_report", request, servers)
    assert [bool(re.fullmatch(r"report of \d{4}-\d\d-\d\d: \d+", line)) for line in lines] == [True] * 3


@either
def test_an_agent_is_done(servers: str, request: pytest.FixtureRequest) -> None:
    asked = [f"delete_file {name}.txt?" for name in "abc"]
    assert said("agent_loop", request, servers) == [*asked, "done after 4 calls"]
