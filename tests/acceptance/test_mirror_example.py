"""The example of a mirrored chord, as a stranger runs it: on servers of its own, and on given ones."""

from __future__ import annotations

import sys

import pytest

from tests.support.brokers import Broker
from tests.support.commandline import ROOT, Project

PLANNED = ["count_words: pending"] * 3 + ["add: pending"]
ENDED = [
    "count_words: succeeded, attempt 2", "count_words: succeeded", "count_words: succeeded", "add: succeeded",
    "announce: succeeded",
]  # fmt: skip


@pytest.mark.parametrize("servers", ["its own", "PostgreSQL and Redis"])
def test_the_chord_is_shown_planned_and_ended(servers: str, request: pytest.FixtureRequest) -> None:
    settings = {}
    if servers != "its own":
        broker: Broker = request.getfixturevalue("redis_server")
        settings = {"FLOW_STORE_URL": request.getfixturevalue("postgresql_url"), "CELERY_BROKER_URL": broker.url}
    ended = Project(ROOT, settings).run(sys.executable, "-W", "error", "-m", "examples.mirror_a_chord")

    assert ended.returncode == 0, ended.stdout + ended.stderr
    head, *said = [line.strip() for line in ended.stdout.splitlines()]
    assert head == "how many words are these? running"
    assert said == [*PLANNED, "how many words are these? finished", *ENDED, "11 words"]
