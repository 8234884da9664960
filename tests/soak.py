"""``python -m tests.soak --minutes N``: flows under random failures, with a verdict at the end.

A monkey kills children and whole workers and flushes the broker, by a seed that makes its choices repeatable. The
verdict is held against a log of what really ran, outside the store. The database is FLOW_STORE_URL, else SQLite.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import click

from celery_flows import FlowHandle, FlowStatus, SqlFlowStore
from celery_flows.worker.embedded import Processes, await_fact, start_broker
from tests.support.effects import EffectLog
from tests.support.fold import assert_whole

WORKERS = ("worker-1", "worker-2")
LEASE_SECONDS = "3"
GRACE_SECONDS = 120.0  # for what is open when the monkey stops


@click.command()
@click.option("--minutes", type=click.FloatRange(min=0), default=5.0, show_default=True)
@click.option("--seed", type=int, default=None, help="Repeats the monkey's choices; default: a new one, printed.")
def main(minutes: float, seed: int | None) -> None:
    """Soaks, and exits 0 only if nothing was lost, nothing recorded ran again, and every history is whole."""
    chosen = seed if seed is not None else random.randrange(2**32)
    click.echo(f"seed {chosen}")
    with tempfile.TemporaryDirectory(prefix="celery-flows-") as scratch, Processes(Path(scratch)) as processes:
        soak = Soak(processes, random.Random(chosen))
        soak.run(minutes * 60)
        wrong = soak.verdict()
    for line in wrong[:20]:
        click.echo(f"WRONG: {line}")
    sys.exit(1 if wrong else 0)


@dataclass
class Soak:
    """One run."""

    processes: Processes
    rng: random.Random
    handles: list[FlowHandle[Any]] = field(default_factory=list)
    struck: Counter[str] = field(default_factory=Counter)

    def run(self, seconds: float) -> None:
        """Starts flows and lets the monkey at the workers for a while; then waits for what is open."""
        self._start()
        from tests.support.soak_app import KINDS, flows  # after the environment is set

        self.flows = flows
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.handles += [kind.start() for kind in KINDS for _ in range(self.rng.randrange(3))]
            self._emit()
            if self.rng.random() < 0.15:
                self._strike()
            time.sleep(self.rng.uniform(0.1, 0.6))
        grace = time.monotonic() + GRACE_SECONDS
        while self._open() and time.monotonic() < grace:
            self._emit()
            time.sleep(0.5)

    def _start(self) -> None:
        self.effects = EffectLog(self.processes.directory / "effects.jsonl")
        os.environ.setdefault("FLOW_STORE_URL", f"sqlite:///{self.processes.directory / 'flows.db'}")
        os.environ.update(
            CELERY_BROKER_URL=start_broker(self.processes),
            FLOW_LEASE_SECONDS=LEASE_SECONDS,
            SOAK_EFFECT_LOG=str(self.effects.path),
        )
        self.effects.path.touch()
        SqlFlowStore.open(os.environ["FLOW_STORE_URL"]).close()
        for name in WORKERS:
            self._start_worker(name)

    def _start_worker(self, name: str) -> None:
        command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            "tests.support.soak_app",
            "worker",
            "-n",
            f"{name}@%h",
            "-c",
            "2",
        ]
        log = self.processes.log_of(name)
        mark = log.stat().st_size if log.exists() else 0
        child = self.processes.start(name, [*command, "-l", "info", "--without-gossip", "--without-mingle"])
        await_fact(lambda: b" ready." in log.read_bytes()[mark:], child, log, 60)

    # ---- the monkey ----

    def _strike(self) -> None:
        kind = self.rng.choice(("child", "child", "worker", "flush"))
        {"child": self._kill_child, "worker": self._kill_worker, "flush": self._flush}[kind]()

    def _kill_child(self) -> None:
        parent = self.processes.children[self.rng.choice(WORKERS)].pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        if children:
            os.kill(int(self.rng.choice(sorted(children))), signal.SIGKILL)
            self.struck["child killed"] += 1

    def _kill_worker(self) -> None:
        name = self.rng.choice(WORKERS)
        victim = self.processes.children[name]
        os.killpg(victim.pid, signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
        self.struck["worker killed"] += 1
        self._start_worker(name)

    def _flush(self) -> None:
        with self.flows.app.connection_for_write() as connection:
            channel: Any = connection.default_channel
            lost = channel.queue_purge("soak")
        self.struck["messages lost"] += lost

    def _emit(self) -> None:
        for handle in self.handles:
            flow = handle.get()
            if flow.status is FlowStatus.WAITING and (flow.wait_json or {}).get("kind") == "external_event":
                self.flows.emit("soak", str(handle.id), "event")

    def _open(self) -> list[UUID]:
        return [handle.id for handle in self.handles if not handle.status().is_terminal]

    # ---- the verdict ----

    def verdict(self) -> list[str]:
        """What is wrong; nothing, if the promises held."""
        ended = Counter(handle.status().value for handle in self.handles)
        lost = [f"flow {flow_id} has not ended" for flow_id in self._open()]
        again, torn = self._ran_again(), self._torn()
        failed = [f"flow {h.id} is {h.status()}" for h in self.handles if h.status() is not FlowStatus.FINISHED]
        click.echo(f"faults: {dict(self.struck)}")
        click.echo(
            f"started {len(self.handles)}, {dict(ended)}, lost {len(lost)}, "
            f"recorded steps that ran again {len(again)}, histories that are not whole {len(torn)}"
        )
        return [*lost, *again, *torn, *failed]

    def _ran_again(self) -> list[str]:
        """A step whose body ended more often than a worker began it can only have run after it was recorded."""
        ran = Counter((line["flow"], line["step"]) for line in self.effects.read())
        allowed: Counter[str] = Counter()
        for handle in self.handles:
            for event in self.flows.store.list_events(handle.id, None):
                allowed[str(handle.id)] += event.kind == "reclaimed"
                allowed[str(handle.id)] += event.kind == "step_started" and event.payload_json["fence"] > 1
        extra: Counter[str] = Counter()
        for (flow_id, _), count in ran.items():
            extra[flow_id] += count - 1
        return [
            f"flow {each}: {count} extra runs, {allowed[each]} takeovers"
            for each, count in extra.items()
            if count > allowed[each]
        ]

    def _torn(self) -> list[str]:
        torn = []
        for handle in self.handles:
            try:
                assert_whole(self.flows.store, handle.id)
            except AssertionError as error:
                torn.append(
                    f"flow {handle.id}: {str(error).splitlines()[0] if str(error) else 'events and rows differ'}"
                )
        return torn


if __name__ == "__main__":
    main()
