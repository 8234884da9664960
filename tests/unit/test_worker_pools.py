"""Which pools a worker with flows may have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from celery.concurrency.prefork import TaskPool as Prefork
from celery.concurrency.solo import TaskPool as Solo
from celery.concurrency.thread import TaskPool as Threads

from celery_flows import InvalidData
from celery_flows.worker.pools import check_pool


@pytest.mark.parametrize("pool", [Prefork, Solo, Threads])
def test_pools_of_processes_and_threads_are_accepted(pool: type) -> None:
    check_pool(SimpleNamespace(pool_cls=pool, pool_start_method="fork"))


@pytest.mark.parametrize("name", ["gevent", "eventlet"])
def test_pools_of_greenlets_are_refused(name: str) -> None:
    pool = type("TaskPool", (), {"__module__": f"celery.concurrency.{name}"})
    with pytest.raises(InvalidData, match=f"do not run under {name}.*use prefork, threads or solo"):
        check_pool(SimpleNamespace(pool_cls=pool))


def test_processes_that_share_nothing_with_their_parent_are_refused() -> None:
    with pytest.raises(InvalidData, match="worker_pool_start_method: must be fork"):
        check_pool(SimpleNamespace(pool_cls=Prefork, pool_start_method="spawn"))
