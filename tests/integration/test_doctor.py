"""What is not well is found, with its cause and its remedy; what is well is left alone. One test a kind of finding."""

from __future__ import annotations

import json
import re
import time
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery

from celery_flows import FlowHandle, Flows, FlowStatus, Limit, Run
from celery_flows.store import dispatch, health, schema
from celery_flows.store import operations as op
from celery_flows.store.schema import VERSION_TABLE
from celery_flows.store.tables import flow_dispatch, flow_heartbeats, flow_steps, flows
from celery_flows.tasks import maintenance, slots
from celery_flows.tasks.runtime import Runtime, claim_token
from celery_flows.worker import doctor
from celery_flows.worker.doctor import KINDS, Finding, examine
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench
from tests.support.faults import black_hole, closed_port


def examined(runtime: Runtime, **options: Any) -> list[Finding]:
    """What is found, where no worker will answer."""
    return examine(runtime, reply_seconds=0.1, **options)


def found(bench: Bench, kind: str, **options: Any) -> list[str]:
    """What is found of this kind."""
    return [finding.about for finding in examined(bench.runtime, **options) if finding.kind == kind]


def define(bench: Bench) -> Any:
    @bench.task("work")
    def work(secret: str) -> str:
        return secret

    @bench.flows.flow("working")
    def working(run: Run, secret: str) -> str:
        return run.step(work, secret)

    return working


def chores_done(bench: Bench) -> None:
    """All chores have been done just now."""
    for name in (maintenance.SWEEP, maintenance.BEAT, maintenance.PRUNE, maintenance.VERIFY):
        maintenance.heartbeat(bench.runtime, name, 10.0)


def backdate(bench: Bench, table: sa.Table, column: str, **to: float) -> None:
    """Sets times back by the database's clock."""
    at = bench.store.run(op.now) - timedelta(**to)
    with bench.store.engine.begin() as connection:
        connection.execute(sa.update(table).values({column: at}))


def begin(bench: Bench) -> FlowHandle[Any]:
    """A flow whose step is out."""
    handle: FlowHandle[Any] = define(bench).start("hunter2")
    bench.drive(handle.id)
    return handle


def test_where_all_is_well_nothing_is_found(bench: Bench) -> None:
    bench.finish(define(bench).start("hunter2"))
    chores_done(bench)
    assert examined(bench.runtime) == []


def test_an_application_that_has_never_been_used_is_ready(bench: Bench) -> None:
    assert examined(bench.runtime) == []


# ---- what everything stands on --------------------------------------------------------------------------------------


def application(store_url: str, broker_url: str = "memory://") -> Runtime:
    app = Celery("examined", broker=broker_url, set_as_current=False)
    app.conf.flow_store_url = store_url
    return Flows(app).runtime


def kinds(runtime: Runtime) -> list[str]:
    return [finding.kind for finding in examined(runtime)]


def test_a_database_out_of_reach_is_found_and_the_password_kept(engine_database: str) -> None:
    away = application(f"postgresql://me:hunter2@127.0.0.1:{closed_port()}/nowhere")
    [finding] = examined(away)
    assert finding.kind == "database"
    assert "hunter2" not in str(finding)


def test_a_database_that_never_answers_is_asked_once(engine_database: str) -> None:
    asked: list[object] = []

    def connects(*args: object) -> None:
        asked.append(args)

    sa.event.listen(sa.Engine, "do_connect", connects)
    try:
        with black_hole() as port:
            assert kinds(application(f"postgresql://me@127.0.0.1:{port}/nowhere")) == ["database"]
    finally:
        sa.event.remove(sa.Engine, "do_connect", connects)
    assert len(asked) == 1


def test_a_schema_that_is_behind_is_found(bench: Bench) -> None:
    version = sa.table(VERSION_TABLE, sa.column("version_num"))
    with bench.store.engine.begin() as connection:
        connection.execute(sa.update(version).values(version_num="0001"))
    try:
        assert kinds(application(bench.url)) == ["schema"]
        assert found(bench, "schema") == [f"the database is at 0001, this program needs {schema.head()}"]
    finally:
        with bench.store.engine.begin() as connection:
            connection.execute(sa.update(version).values(version_num=schema.head()))


def test_a_database_without_tables_is_found(tmp_path: Path) -> None:
    [finding] = examined(application(f"sqlite:///{tmp_path}/empty.db"))
    assert (finding.kind, finding.about) == (
        "schema",
        f"the database is at no version, this program needs {schema.head()}",
    )


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_broker_out_of_reach_is_found_in_bounded_time(bench: Bench, scheme: str) -> None:
    runtime = application(bench.url, f"{scheme}://me:hunter2@127.0.0.1:{closed_port()}//")
    [finding] = examined(runtime)
    assert finding.kind == "broker"
    assert "hunter2" not in str(finding)


def test_a_broker_that_accepts_and_never_answers_is_found_too(bench: Bench) -> None:
    with black_hole() as port:
        began = time.monotonic()
        assert kinds(application(bench.url, f"redis://127.0.0.1:{port}/0")) == ["broker"]
        assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("off", "said"), [(-90, "the database's is 90 s ahead"), (90, "the database's is 90 s behind")]
)
def test_a_clock_far_from_the_databases_is_found(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, off: int, said: str
) -> None:
    class Wrong(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Wrong:
            return super().now(tz) + timedelta(seconds=off)

    monkeypatch.setattr(doctor, "datetime", Wrong)
    assert found(bench, "clock") == [said]


# ---- chores ---------------------------------------------------------------------------------------------------------


def test_silent_sweeps_and_a_silent_beat_are_found(bench: Bench) -> None:
    begin(bench)
    assert found(bench, "sweep_silent") == ["never seen"]
    assert found(bench, "beat_silent") == ["never seen"]
    chores_done(bench)
    assert found(bench, "sweep_silent") == found(bench, "beat_silent") == []
    backdate(bench, flow_heartbeats, "at", seconds=3 * 10 + 40)
    for kind in ("sweep_silent", "beat_silent"):
        (about,) = found(bench, kind)
        assert re.fullmatch(r"last seen 7\d s ago", about)


def test_a_chore_that_beat_has_stopped_doing_is_found(bench: Bench) -> None:
    chores_done(bench)
    backdate(bench, flow_heartbeats, "at", seconds=3 * 10 + 40)
    prune, verify = found(bench, "chore_silent")
    assert re.fullmatch(r"prune: last seen 7\d s ago", prune)
    assert re.fullmatch(r"verify: last seen 7\d s ago", verify)


def test_a_slot_that_has_passed_and_that_nobody_looked_at_is_found(bench: Bench) -> None:
    @bench.flows.flow("hourly", schedule=timedelta(hours=1))
    def hourly(run: Run) -> None: ...

    assert found(bench, "slot_missed") == []  # nobody has looked yet: it is new
    slots.start_due(bench.runtime)
    assert found(bench, "slot_missed") == []
    last = {"slot": (bench.store.run(op.now) - timedelta(hours=3)).isoformat(), "flow": None}
    with bench.store.engine.begin() as connection:
        connection.execute(sa.update(flow_heartbeats).values(report=last))
    [about] = found(bench, "slot_missed")
    assert about.startswith("flow 'hourly' at ")
    slots.start_due(bench.runtime)
    assert found(bench, "slot_missed") == []
    bench.work()


def test_a_slot_that_was_left_out_is_a_notice_for_a_day(bench: Bench) -> None:
    @bench.flows.flow("hourly", schedule=timedelta(hours=1), overlap="skip")
    def hourly(run: Run) -> None: ...

    slots.start_due(bench.runtime)
    assert found(bench, "slot_skipped") == []
    at = bench.store.run(op.now)
    for hours, told in (3, ["flow 'hourly' at {}; 7 so far"]), (25, []):
        last = (at - timedelta(hours=hours)).isoformat()
        report = {"slot": at.isoformat(), "flow": None, "skipped": {"count": 7, "last": last}}
        with bench.store.engine.begin() as connection:
            connection.execute(sa.update(flow_heartbeats).values(report=report))
        assert found(bench, "slot_skipped") == [each.format(last) for each in told]
    assert not KINDS["slot_skipped"].is_problem


def test_what_an_audit_found_is_told_until_it_is_mended(bench: Bench) -> None:
    begin(bench)
    assert maintenance.verify_sample(bench.runtime) == []
    assert found(bench, "history") == []
    forge(bench, attempt=7)
    [finding] = maintenance.verify_sample(bench.runtime)
    assert found(bench, "history") == [str(finding)]
    [again] = maintenance.verify_sample(bench.runtime, size=0)
    assert again == finding, "what was not whole is looked at again, whatever the sample"
    forge(bench, attempt=1)
    assert found(bench, "history") == []


def forge(bench: Bench, **columns: Any) -> None:
    with bench.store.engine.begin() as connection:
        connection.execute(sa.update(flow_steps).values(columns))


def test_what_was_written_past_the_manager_is_no_reason_not_to_be_ready(
    make_bench: MakeBench, engine_database: str
) -> None:
    bench = make_bench()
    flow = bench.flows.manager.create_managed(controller_id="by hand", goal="", owner_session_key="me")
    bench.store.update_with_revision(flow)
    maintenance.verify_sample(bench.runtime)
    assert len(found(bench, "untold")) == 1
    assert not KINDS["untold"].is_problem
    with bench.store.engine.begin() as connection:
        connection.execute(sa.delete(flows).where(flows.c.id == flow.id))


# ---- work that stands -----------------------------------------------------------------------------------------------


def test_work_that_no_sweep_looks_at_is_found(bench: Bench) -> None:
    begin(bench)
    assert found(bench, "overdue") == []
    backdate(bench, flow_dispatch, "due_at", seconds=100)
    assert found(bench, "overdue") == ["2 rows, the first for 100 s"]


def test_work_that_is_published_and_never_claimed_is_found(bench: Bench) -> None:
    begin(bench)
    for _ in range(2):
        bench.pass_time()
        bench.sweep()
    assert found(bench, "unclaimed") == [f"1 of 'work' on queue {bench.queue}"]
    assert found(bench, "no_consumer") == [f"1 rows wait on queue {bench.queue}; no worker answered for it"]


def test_flows_that_queue_for_a_slot_for_long_are_a_notice(bench: Bench) -> None:
    @bench.task("work")
    def work() -> None: ...

    @bench.flows.flow("limited", limit=Limit(1))
    def limited(run: Run) -> None:
        run.gather([work.s()])

    holder, *others = (limited.start() for _ in range(3))
    for handle in holder, *others:
        bench.drive(handle.id)
    assert found(bench, "queued") == []
    with bench.store.engine.begin() as connection:
        long_ago = op.now(connection) - timedelta(seconds=700)
        queued = sa.update(flow_dispatch).where(flow_dispatch.c.queued_at.isnot(None))
        connection.execute(queued.values(queued_at=long_ago))
    (told,) = found(bench, "queued")
    assert told.startswith("2 of 'limited', the first for 7")
    others[0].pause()
    (told,) = found(bench, "queued")
    assert told.startswith("1 of 'limited'")
    assert not KINDS["queued"].is_problem
    others[0].unpause()
    bench.work()
    assert found(bench, "queued") == []


def test_a_paused_flow_waits_for_nobody(bench: Bench) -> None:
    handle = begin(bench)
    bench.flows.manager.pause(handle.id)
    for _ in range(4):
        bench.pass_time()
        bench.sweep()
    assert found(bench, "unclaimed") == found(bench, "no_consumer") == []
    bench.flows.manager.unpause(handle.id)
    assert len(found(bench, "unclaimed")) >= 1
    bench.work()


def test_workers_that_sweep_and_do_not_answer_are_a_notice(bench: Bench) -> None:
    begin(bench)
    chores_done(bench)
    assert found(bench, "no_answer") == [f"1 rows wait on queue {bench.queue}"]
    assert found(bench, "no_consumer") == []


def test_a_lease_that_is_renewed_without_progress_is_found(bench: Bench) -> None:
    handle = begin(bench)
    [(_, run_id)] = [row for row in bench.claimable() if row[0] == "step"]
    claim = bench.store.run(dispatch.claim_step, run_id, claim_token("node/1"), 30.0)
    assert claim is not None
    assert found(bench, "stalled", stalled_seconds=100) == []
    backdate(bench, flow_steps, "updated_at", seconds=200)
    assert bench.store.run(dispatch.renew_own, claim.holder, 30.0)
    told = f"step 'work' of flow {handle.id}, held by {claim.holder.worker}, for 200 s"
    assert found(bench, "stalled", stalled_seconds=100) == [told]
    bench.recover()
    assert found(bench, "stalled", stalled_seconds=100) == []


def test_a_driver_without_progress_is_found(bench: Bench) -> None:
    handle = define(bench).start("hunter2")
    bench.store.run(dispatch.claim_drive, handle.id, claim_token("node/1"), 30.0)
    updated_at = handle.get().updated_at
    backdate(bench, flows, "updated_at", seconds=200)
    [told] = found(bench, "stalled", stalled_seconds=100)
    assert told.startswith(f"flow 'working' of flow {handle.id}, held by node/1/")
    with bench.store.engine.begin() as connection:  # the row is to be as its history says
        connection.execute(sa.update(flows).values(updated_at=updated_at))


@pytest.mark.parametrize(
    ("kind", "about"), [("unknown_flow", "1 of 'working', version 1"), ("unknown_task", "1 of 'work'")]
)
def test_open_work_of_unknown_name_is_found(make_bench: MakeBench, kind: str, about: str) -> None:
    begin(make_bench())
    assert found(make_bench(), kind) == [about]


def test_a_flow_whose_function_has_changed_is_left_alone_and_found(make_bench: MakeBench) -> None:
    handle = begin(make_bench())
    deployed = make_bench()

    @deployed.flows.flow("working")
    def working(run: Run, secret: str) -> str:
        return run.step(str.upper, secret)

    deployed.call_driver(handle.id)
    deployed.work()
    assert found(deployed, "history_refused") == [
        f"flow {handle.id} of 'working': step 1 of the history is 'work', but the flow function came to 'upper'"
    ]
    assert handle.status() is FlowStatus.RUNNING
    assert found(deployed, "history_refused") != []


def test_work_that_kills_its_workers_is_found_and_so_is_what_was_given_up(bench: Bench) -> None:
    handle = begin(bench)
    [(_, run_id)] = [row for row in bench.claimable() if row[0] == "step"]
    for number in range(1, bench.runtime.settings.max_crashes + 1):
        assert bench.store.run(dispatch.claim_step, run_id, claim_token(f"node/{number}"), 30.0)
        bench.end_leases()
        bench.sweep()
        if 1 < number < bench.runtime.settings.max_crashes:
            told = [f"step 'work' of flow {handle.id}: {number} crashes, given up at 5"]
            assert found(bench, "crashing") == told
    bench.work()
    assert handle.status() is FlowStatus.FAILED
    assert found(bench, "crashing") == []
    assert found(bench, "lost") == [f"1 flows: {handle.id}"]
    backdate(bench, flows, "rest_at", days=2)
    assert found(bench, "lost") == []


# ---- how it is told -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_test_of_its_own(kind: str) -> None:
    assert f'"{kind}"' in Path(__file__).read_text()


def test_findings_carry_names_and_ids_and_never_a_payload(bench: Bench) -> None:
    begin(bench)
    backdate(bench, flow_dispatch, "due_at", seconds=100)
    told = [json.dumps(finding.as_json()) for finding in examined(bench.runtime)]
    assert len(told) >= 3
    assert not any("hunter2" in text for text in told)


def test_a_finding_says_what_why_and_what_to_do() -> None:
    assert str(Finding("broker", "OperationalError")).splitlines() == [
        "problem broker: OperationalError",
        "  cause: the broker cannot be reached",
        "  remedy: start it, or correct broker_url (CELERY_BROKER_URL)",
    ]


def test_names_do_nothing_to_a_terminal() -> None:
    assert "\x1b" not in str(Finding("unknown_flow", "1 of 'a\x1b[2Jb'"))


def test_the_sample_takes_the_latest_flows_and_some_of_all_the_others(bench: Bench) -> None:
    working = define(bench)
    ids = [working.start("hunter2").id for _ in range(12)]
    latest = list(reversed(ids))
    assert bench.store.run(health.sample_ids, 20, Random(1)) == latest
    seen: set[Any] = set()
    for seed in range(200):
        sample = bench.store.run(health.sample_ids, 3, Random(seed))
        assert sample[:3] == latest[:3]
        assert len(sample) == len(set(sample)) <= 6
        seen.update(sample)
    assert len(seen) > 8
