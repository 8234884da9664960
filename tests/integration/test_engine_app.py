"""Flows in somebody's Celery app: what it adds is added, and everything else of the app stays as it was."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery, current_app
from celery.schedules import crontab

from celery_flows import Flows, InvalidData, Run, SqlFlowStore
from celery_flows.store.engines import make_engine
from celery_flows.store.tables import flows as flows_table
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench

OUR_ENTRIES = {"celery-flows: sweep", "celery-flows: prune", "celery-flows: verify"}


def shop(**conf: Any) -> Celery:
    """A user's app, as it was before."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.update(task_acks_late=True, worker_prefetch_multiplier=7, task_serializer="json", **conf)

    @app.task(name="shop.greet", shared=False)
    def greet(name: str) -> str:
        return f"hello {name}"

    return app


def test_the_users_app_stays_as_it_was() -> None:
    plain, with_flows = shop(), shop()
    current = current_app._get_current_object()  # type: ignore[attr-defined]
    flows = Flows(with_flows)
    for app in (plain, with_flows):
        app.finalize()

    assert dict(with_flows.conf.table()) == dict(plain.conf.table())
    assert set(with_flows.tasks) - set(plain.tasks) == {
        "flows.drive", "flows.step", "flows.sweep", "flows.prune", "flows.verify", "flows.look", "flows.start",
    }  # fmt: skip
    greet = with_flows.tasks["shop.greet"]
    assert (greet.acks_late, greet("you"), type(greet).__mro__[1]) == (True, "hello you", with_flows.Task)
    assert current_app._get_current_object() is current  # type: ignore[attr-defined]
    assert Flows.of(with_flows) is flows


def test_our_tasks_keep_their_own_options_in_any_app() -> None:
    app = shop(task_ignore_result=False, task_reject_on_worker_lost=True, task_track_started=True)
    Flows(app)
    app.finalize()
    for name in ("flows.drive", "flows.step", "flows.sweep", "flows.prune", "flows.verify", "flows.look"):
        task = app.tasks[name]
        assert (task.acks_late, task.reject_on_worker_lost, task.ignore_result) == (False, False, True)
        assert (task.serializer, task.rate_limit, task.max_retries) == ("json", None, 0)


def test_beat_entries_join_the_users_own_schedule() -> None:
    mine = {"greet": {"task": "shop.greet", "schedule": 60.0, "args": ("you",)}}
    app = shop(beat_schedule=dict(mine))
    Flows(app)
    app.finalize()
    schedule = app.conf.beat_schedule
    assert schedule["greet"] == mine["greet"]
    assert schedule["celery-flows: sweep"]["task"] == "flows.sweep"
    assert schedule["celery-flows: sweep"]["schedule"] == 10.0
    assert schedule["celery-flows: prune"]["task"] == "flows.prune"
    assert isinstance(schedule["celery-flows: prune"]["schedule"], crontab)
    assert set(schedule) == {"greet", *OUR_ENTRIES}


def test_beat_entries_join_a_schedule_that_is_set_later() -> None:
    app = shop()
    Flows(app)
    app.conf.beat_schedule = {"greet": {"task": "shop.greet", "schedule": 60.0}}
    app.finalize()
    assert set(app.conf.beat_schedule) == {"greet", *OUR_ENTRIES}


def test_one_app_has_one_flows() -> None:
    app = shop()
    Flows(app)
    with pytest.raises(InvalidData, match="has its Flows already"):
        Flows(app)


def test_nothing_is_read_or_connected_before_it_is_needed() -> None:
    app = shop(flow_store_url="nonsense", flow_no_such_setting=1)
    flows = Flows(app)

    @flows.flow("defined")
    def defined(run: Run) -> None: ...

    with pytest.raises(InvalidData, match="flow_no_such_setting"):
        defined.start()


def test_two_apps_of_one_process_keep_their_flows_apart(make_bench: MakeBench) -> None:
    """Celery gives a shared task to every app of the process: the second app would drive with the first one's flows."""
    first, second = make_bench(), make_bench()

    @first.flows.flow("only here")
    def only_here(run: Run) -> str:
        return "first"

    for bench in (first, second):
        bench.app.finalize()
    tasks = [bench.app.tasks["flows.drive"] for bench in (first, second)]
    handle = only_here.start()
    tasks[1].apply(kwargs={"flow_id": str(handle.id)}, throw=True)
    assert not handle.status().is_terminal
    first.pass_time()
    tasks[0].apply(kwargs={"flow_id": str(handle.id)}, throw=True)
    assert handle.result(0) == "first"
    stranger = Celery("stranger", broker="memory://", set_as_current=False)
    stranger.finalize()
    assert not any(name.startswith("flows.") for name in stranger.tasks)


def test_any_celery_client_starts_a_flow_once_per_message(bench: Bench) -> None:
    @bench.flows.flow("doubles")
    def doubles(run: Run, n: int) -> int:
        return 2 * n

    start = bench.app.tasks["flows.start"]
    options = {"name": "doubles", "input": 4, "owner": "tenant:acme"}
    first, again = (str(start.apply(kwargs=options, task_id="one", throw=True).result) for _ in range(2))
    assert first == again
    handle = bench.flows.handle(first)
    assert bench.finish(handle) == 8
    assert handle.get().owner_session_key == "tenant:acme"


def refused(bench: Bench, **message: Any) -> str:
    """What a client is told whose message starts nothing."""
    answer = bench.app.tasks["flows.start"].apply(kwargs=message, task_id="one")
    assert answer.failed()
    assert bench.query(sa.select(flows_table.c.id)) == []
    return str(answer.result)


def test_a_message_may_say_how_to_start(bench: Bench) -> None:
    @bench.flows.flow("doubles")
    def doubles(run: Run, n: int) -> int:
        return 2 * n

    start = bench.app.tasks["flows.start"]
    options = {"key": "k", "owner": "tenant:acme", "goal": "to double", "priority": 9, "eta": "2099-01-01T00:00:00Z"}
    handle = bench.flows.handle(str(start.apply(kwargs={"name": "doubles", "input": 4, **options}, throw=True).result))
    flow, [row] = handle.get(), bench.rows(handle.id)
    assert (flow.idempotency_key, flow.owner_session_key, flow.goal) == ("k", "tenant:acme", "to double")
    assert (row.priority, row.due_at, row.publish_count) == (9, datetime(2099, 1, 1, tzinfo=UTC), 0)
    later = {"name": "doubles", "input": 4, "countdown": 3600, "key": None}
    first, again = (str(start.apply(kwargs=later, task_id="one", throw=True).result) for _ in range(2))
    assert first == again
    assert bench.claimable() == []
    bench.pass_time()
    bench.work()


def test_a_message_that_is_wrong_is_answered_by_one_sentence_without_its_input(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    @bench.flows.flow("doubles")
    def doubles(run: Run, n: int) -> int:
        return 2 * n

    secret = "hunter2"
    good = {"name": "doubles", "input": 4}
    assert refused(bench, **{**good, "input": secret}).startswith("input: ")
    assert refused(bench, **{**good, "colour": secret}) == (
        "options: 'colour' is none; there are key, owner, goal, priority, countdown, eta"
    )
    assert refused(bench, **{**good, "eta": secret}).startswith("eta: must be a time in ISO 8601")
    assert refused(bench, **{**good, "eta": "2099-01-01T00:00:00"}).startswith("eta: needs a time zone")
    assert refused(bench, **{**good, "countdown": secret}) == "countdown: must be seconds or a timedelta"
    assert refused(bench, **{**good, "priority": secret}) == "priority: must be a whole number from 0 to 255"
    assert refused(bench, **{**good, "session": secret}).startswith("options: 'session' is none")
    assert refused(bench, **{**good, "owner": ["a"]}).startswith("owner: ")
    assert refused(bench, input=secret) == "name: must be a string, not NoneType"
    assert refused(bench, name="unknown", input=secret) == ("no flow definition 'unknown'; registered are: doubles")
    assert caplog.text.count("a start is refused: ") == 10
    assert secret not in caplog.text
    assert "Traceback" not in caplog.text


def test_the_chores_run_as_tasks(bench: Bench) -> None:
    @bench.flows.flow("ends")
    def ends(run: Run) -> None: ...

    handle = ends.start()
    bench.messages()
    bench.pass_time()
    bench.app.tasks["flows.sweep"].apply(throw=True)
    assert [message.id for message in bench.messages()] == [str(handle.id)]
    bench.finish(handle)
    bench.app.tasks["flows.prune"].apply(kwargs={"retain_days": 1}, throw=True)
    assert handle.status().is_terminal
    bench.app.tasks["flows.prune"].apply(kwargs={"retain_days": 0}, throw=True)
    assert bench.store.get(handle.id) is None


def test_a_store_of_ones_own_making_is_used(sqlite_url: str) -> None:
    store = SqlFlowStore(make_engine(sqlite_url))
    flows = Flows(shop(), store=store)
    assert flows.store is store
    assert flows.manager.store is store
    store.close()
