"""The soak's broker, its own alone, and what can be done to it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import redis
from kombu import Connection

from celery_flows.worker.embedded import BROKER, Processes, start_broker
from tests.soak.application import QUEUE
from tests.support.brokers import OwnRedis, rabbitmq_broker
from tests.support.faults import closed_port

BROKERS = ("embedded", "redis", "rabbitmq")


class SoakBroker(Protocol):
    """What the monkey asks of a broker."""

    url: str
    restartable: bool  # the server is ours to kill

    def lose(self) -> int:
        """All messages that wait are gone; gives how many."""

    def cut(self) -> int:
        """Closes all connections; gives how many."""

    def restart(self) -> bool:
        """Kills the server and starts it again, empty; whether it serves the same address."""


class _Redis:
    """A Redis server of the soak's own."""

    restartable = True

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def lose(self) -> int:
        with self._client.pipeline(transaction=True) as lost:
            lost.llen(QUEUE)
            lost.flushdb()
            waiting: int = lost.execute()[0]
        return waiting

    def cut(self) -> int:
        client: Any = self._client
        return sum(int(client.client_kill_filter(_type=kind)) for kind in ("normal", "pubsub"))


class EmbeddedBroker(_Redis):
    """The server that comes along, as ``celery-flows dev`` starts it."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self.url = start_broker(processes)
        socket = self.url.removeprefix("redis+socket://").partition("?")[0]
        super().__init__(redis.Redis(unix_socket_path=socket))

    def restart(self) -> bool:
        self._processes.kill(BROKER)
        self._processes.children[BROKER].wait()
        shutil.rmtree(self._processes.directory / "appendonlydir", ignore_errors=True)
        return start_broker(self._processes) == self.url


class RedisServer(_Redis):
    """``redis-server`` on a port, without a disk."""

    def __init__(self, server: OwnRedis) -> None:
        self._server = server
        self.url = server.url
        super().__init__(redis.Redis.from_url(server.url))

    def restart(self) -> bool:
        self._server.kill()
        self._server.start()
        return True


class RabbitVhost:
    """A virtual host on the server of this machine."""

    restartable = False

    def __init__(self, url: str) -> None:
        self.url = url
        self._vhost = url.rpartition("/")[2]

    def lose(self) -> int:
        with Connection(self.url) as connection:
            channel: Any = connection.default_channel
            lost = channel.queue_purge(QUEUE)
        return int(lost)

    def cut(self) -> int:
        listed = self._ctl("list_connections", "pid", "vhost").splitlines()
        ours = [line for line in listed if line.endswith(f"\t{self._vhost}")]
        if ours:
            self._ctl("close_all_connections", "--vhost", self._vhost, "soak")
        return len(ours)

    def restart(self) -> bool:
        raise NotImplementedError("the server is not ours alone")

    def _ctl(self, *arguments: str) -> str:
        done = subprocess.run(["rabbitmqctl", "--silent", *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"rabbitmqctl {arguments[0]}: {done.stdout}{done.stderr}"
        return done.stdout


@contextmanager
def open_broker(name: str, processes: Processes) -> Iterator[SoakBroker]:
    """A broker of this kind; nothing of it is left afterwards."""
    if name == "embedded":
        os.environ.pop("CELERY_BROKER_URL", None)  # that would be somebody else's
        yield EmbeddedBroker(processes)
    elif name == "redis":
        server = OwnRedis(closed_port(), processes.directory)
        server.start()
        try:
            yield RedisServer(server)
        finally:
            server.close()
    else:
        with rabbitmq_broker() as broker:
            yield RabbitVhost(broker.url)
