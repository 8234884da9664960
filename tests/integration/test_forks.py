"""A process that used its store and then forks: parent and children go on at once, none reads another's answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing

import pytest

from celery_flows.store import SqlFlowStore
from celery_flows.store.engines import make_engine
from tests.support.fold import assert_whole

APPLICATION = """
import json, os, sys
from contextlib import ExitStack
import sqlalchemy as sa
from celery import Celery
from celery_flows import Flows, SqlFlowStore
from celery_flows.store.engines import make_engine

url, whose = sys.argv[1:]
app = Celery("forks", broker="memory://", set_as_current=False)
app.conf.flow_store_url = url
flows = Flows(app, store=SqlFlowStore(make_engine(url)) if whose == "given" else None)

def create(name):
    return flows.manager.create_managed(controller_id=name, owner_session_key="me")
"""

AT_ONCE = """
QUERIES, MOVES = 150, 15
names = ("parent", "one", "two")
made = {name: create(name) for name in names}
with ExitStack() as opened:  # several connections, all used and all back in the pool when it forks
    for connection in [opened.enter_context(flows.store.engine.connect()) for _ in range(3)]:
        connection.scalar(sa.text("SELECT 1"))

def work(name):
    mine, wrong = made[name], 0
    for number in range(QUERIES):
        told = f"{name} {number}"
        with flows.store.engine.connect() as connection:
            wrong += connection.scalar(sa.text("SELECT :told"), {"told": told}) != told
        wrong += flows.store.get(mine.id) != mine
        if number % (QUERIES // MOVES) == 0:
            mine = flows.manager.update_state(mine.id, {"told": told})
            wrong += mine.state_json != {"told": told}
    return {"process": os.getpid(), "wrong": wrong, "revision": mine.revision}

gate, open_gate = os.pipe()
children = {}
for name in names[1:]:
    answer, tell = os.pipe()
    if (child := os.fork()) == 0:
        os.close(open_gate)
        os.read(gate, 1)  # ends when the parent opens it: all begin at once
        said = {"error": "none"}
        try:
            said = work(name)
        except BaseException as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        finally:
            os.write(tell, json.dumps(said).encode())
            os._exit(0)
    os.close(tell)
    children[name] = (child, answer)
os.close(open_gate)
said = {"parent": work("parent")}
for name, (child, answer) in children.items():
    said[name] = json.loads(os.read(answer, 4096))
    os.waitpid(child, 0)
print(json.dumps(said))
"""


def run(script: str, url: str, whose: str) -> str:
    """What the application of this script says."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", APPLICATION + script, url, whose],
        capture_output=True, text=True, timeout=60, check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


whoever = pytest.mark.parametrize("whose", ["its own", "given"])


@whoever
def test_parent_and_children_use_a_store_at_once_and_none_has_anothers_answer(database_url: str, whose: str) -> None:
    said = json.loads(run(AT_ONCE, database_url, whose))
    assert len({answer["process"] for answer in said.values()}) == 3
    assert {name: (answer["wrong"], answer["revision"]) for name, answer in said.items()} == dict.fromkeys(
        ("parent", "one", "two"), (0, 16)
    )
    with closing(SqlFlowStore(make_engine(database_url))) as store:
        histories = [assert_whole(store, flow.id) for flow in store.list_by_owner("me")]
    assert [len(history) for history in histories] == [16, 16, 16]


OUTLIVED = """
create("before")
gate, open_gate = os.pipe()
answer, tell = os.pipe()
child = os.fork()
if child == 0:
    os.close(open_gate)
    create("child, with its parent")
    os.write(tell, b".")
    os.read(gate, 1)
    create("child, after its parent")
    os._exit(0)
os.read(answer, 1)
flows.store.close()  # as a parent does that ends before its children
os.close(open_gate)
assert os.waitpid(child, 0)[1] == 0
"""


@whoever
def test_what_a_child_commits_after_its_parent_has_closed_its_store_is_not_lost(database_url: str, whose: str) -> None:
    """SQLite remembers a process's locks: a forked child believes that it holds those of its parent."""
    run(OUTLIVED, database_url, whose)
    with closing(SqlFlowStore(make_engine(database_url))) as store:
        kept = {flow.controller_id for flow in store.list_by_owner("me")}
    assert kept == {"before", "child, with its parent", "child, after its parent"}
