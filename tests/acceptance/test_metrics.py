"""A worker tells what it and its processes have counted, whatever becomes of them."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from celery_flows import FlowStatus
from celery_flows.tasks.metrics import METRICS
from tests.acceptance.conftest import MakeTown, Town
from tests.support.brokers import Broker
from tests.support.scrape import ANY, PORT, ask, await_value, scrape, url_of
from tests.support.shop import Order
from tests.support.waiting import until
from tests.support.workers import Worker, is_alive


@pytest.fixture
def metered(make_town: MakeTown, redis_server: Broker) -> Town:
    return make_town(redis_server.url)


def folder_of(town: Town) -> list[Path]:
    return list((town.directory / "tmp").glob("celery-flows-metrics-*"))


def start_worker(town: Town, *options: str, port: str = ANY, ready: bool = True) -> Worker:
    """A worker with metrics, whose temporary files are the town's."""
    (town.directory / "tmp").mkdir(exist_ok=True)
    return town.worker(*options, ready=ready, **{PORT: port, "TMPDIR": str(town.directory / "tmp")})


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_flows_and_steps_are_counted_and_timed_under_every_pool(metered: Town, pool: str) -> None:
    worker = start_worker(metered, "--pool", pool)
    handles = [metered.shop.fulfil.start(Order(id=f"order-{number}")) for number in range(4)]
    for handle in handles:
        metered.shop.flows.emit("approval", handle.get().input_json["id"], {"by": "Ada"})
    for handle in handles:
        handle.result(60)

    of_flow = {"definition": "shop/fulfil"}
    await_value(worker, 4, "flows_ended_total", **of_flow, status="finished")
    await_value(worker, 4, "step_attempts_total", **of_flow, step="shop.charge", outcome="succeeded")
    found = scrape(worker)
    assert found.value("flows_begun_total", **of_flow) == 4
    assert found.value("step_attempts_total", **of_flow, step="reserve", outcome="succeeded") == 4
    assert found.value("step_seconds_count", **of_flow, step="shop.charge") == 4
    assert found.value("step_seconds_bucket", **of_flow, step="shop.charge", le="+Inf") == 4
    assert found.value("step_attempts_total", outcome="failed") == 0
    assert found.value("run_seconds_count", **of_flow) >= 4
    assert found.value("sweep_seconds_count") > 0
    assert found.value("messages_total", outcome="published") > 0
    assert found.value("database_up") == 1
    assert found.value("heartbeat_age_seconds", chore="sweep") < 60


def test_open_flows_are_told_by_the_store(metered: Town) -> None:
    worker = start_worker(metered)
    waiting = [metered.shop.delayed.start(3600.0) for _ in range(3)]
    metered.shop.flows.manager.create_managed(
        controller_id="made up 4711", goal="", owner_session_key="default", requester_origin=None, current_step=None,
        state_json={},
    )  # fmt: skip
    until(lambda: all(handle.status() is FlowStatus.WAITING for handle in waiting), "all wait", within_seconds=30)

    await_value(worker, 3, "open_flows", definition="shop/delayed", status="waiting")
    await_value(worker, 1, "open_flows", definition="(other)", status="created")
    assert "4711" not in scrape(worker).text
    for handle in waiting:
        handle.cancel()
    await_value(worker, 0, "open_flows", definition="shop/delayed")


def test_what_a_child_has_counted_outlives_its_kill_and_the_work_goes_on(metered: Town) -> None:
    worker = start_worker(metered, "-c", "1")
    (victim,) = worker.children()
    for _ in range(3):
        metered.shop.many_inline.start(2)
    await_value(worker, 3, "flows_ended_total", definition="shop/many inline")
    before = scrape(worker)
    files = {path.name for path in folder_of(metered)[0].iterdir()}
    assert f"counter_{victim}.db" in files

    held = metered.shop.held_inline.start("held")
    until(lambda: metered.shop.effects.read("held began"), "a step runs", within_seconds=30)
    os.kill(victim, signal.SIGKILL)
    until(lambda: not is_alive(victim), "the child is dead")
    metered.shop.open_gate()
    held.result(60)

    await_value(worker, 1, "flows_ended_total", definition="shop/held inline")
    after = scrape(worker)
    for name, labels in (
        ("flows_ended_total", {"definition": "shop/many inline"}),
        ("step_attempts_total", {"definition": "shop/many inline"}),
        ("step_seconds_sum", {"definition": "shop/many inline"}),
        ("step_seconds_count", {"definition": "shop/many inline"}),
    ):
        assert after.value(name, **labels) == before.value(name, **labels)
    assert after.value("leases_total", what="released") + after.value("leases_total", what="ended") >= 1
    assert not [path for path in folder_of(metered)[0].iterdir() if path.stem.endswith(f"_{victim}")]


def test_files_of_recycled_children_do_not_pile_up(metered: Town) -> None:
    worker = start_worker(metered, "-c", "1", "--max-tasks-per-child", "1")
    handles = [metered.shop.many_inline.start(1) for _ in range(4)]
    for handle in handles:
        handle.result(60)

    await_value(worker, 4, "flows_ended_total", definition="shop/many inline", status="finished")
    scrape(worker)
    assert (
        len({path.stem.partition("_")[2] for path in folder_of(metered)[0].iterdir()}) <= 2
    )  # the main process and the child that is


def test_a_file_that_a_child_died_over_spoils_no_scrape(metered: Town) -> None:
    worker = start_worker(metered, "-c", "1")
    (victim,) = worker.children()
    os.kill(victim, signal.SIGKILL)
    until(lambda: not is_alive(victim), "the child is dead")
    (folder_of(metered)[0] / f"counter_{victim}.db").write_bytes(b"")

    assert scrape(worker).value("database_up") == 1


def test_the_folder_is_gone_with_the_worker_and_the_port_is_free(metered: Town) -> None:
    worker = start_worker(metered)
    port = url_of(worker).rpartition(":")[2]
    assert len(folder_of(metered)) == 1
    refused = start_worker(metered, port=port, ready=False)
    assert refused.wait_exit() != 0
    assert f"flow_metrics_port: {port} cannot be listened at" in refused.output
    assert "Traceback" not in refused.output

    worker.terminate()
    worker.wait_exit()
    assert folder_of(metered) == []
    assert url_of(start_worker(metered, port=port)).endswith(port)


def test_children_that_outlive_their_parent_do_not_keep_the_port(metered: Town) -> None:
    worker = start_worker(metered)
    port = url_of(worker).rpartition(":")[2]
    for child in worker.children():
        os.kill(child, signal.SIGSTOP)
    worker.process.kill()
    worker.process.wait(10)

    assert url_of(start_worker(metered, port=port)).endswith(port)


def test_a_worker_says_whether_it_lives_and_whether_flows_go_on(metered: Town) -> None:
    worker = start_worker(metered)

    assert ask(worker, "/healthz") == (200, "ok\n")
    assert ask(worker, "/readyz") == (200, "ok\n")
    assert ask(worker, "/elsewhere")[0] == 404
    metered.shop.flows.manager.create_managed(
        controller_id="nobody knows it", goal="", owner_session_key="default", requester_origin=None,
        current_step=None, state_json={},
    )  # fmt: skip
    assert ask(worker, "/readyz") == (200, "ok\n")  # kept for some seconds


def test_a_worker_without_a_port_counts_nothing(metered: Town) -> None:
    (metered.directory / "tmp").mkdir()
    metered.worker(TMPDIR=str(metered.directory / "tmp"))
    metered.shop.many_inline.start(1).result(60)

    assert folder_of(metered) == []


def test_every_label_is_bounded(metered: Town) -> None:
    """Whatever flows and steps are called as they go."""
    worker = start_worker(metered)
    handle = metered.shop.fulfil.start(Order(id="order-8888"))
    metered.shop.flows.emit("approval", "order-8888", {"by": "Ada"})
    handle.result(60)
    await_value(worker, 1, "flows_ended_total", definition="shop/fulfil")

    found = scrape(worker)
    assert str(handle.id) not in found.text
    assert "order-8888" not in found.text
    assert not re.search(r"[0-9a-f]{8}-[0-9a-f]{4}-", found.text)
    allowed = {label for metric in METRICS for label in metric.labels} | {"kind", "chore", "definition", "status", "le"}
    assert {label for name in found.names for label in found.labels(name)} <= allowed
