"""One soak: customers and monkey for a time, then patience for what is open, then the verdict."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from celery_flows.worker.embedded import Processes
from tests.soak.application import BROKER, DATABASE, EFFECTS
from tests.soak.brokers import SoakBroker
from tests.soak.customers import Customers
from tests.soak.databases import SoakDatabase
from tests.soak.flows import open_application
from tests.soak.monkey import strikes
from tests.soak.recovery import Struck
from tests.soak.report import Verdict, reach_verdict, with_children
from tests.soak.stage import WORKERS, Stage
from tests.soak.strikes import Striker
from tests.soak.verdict import Wrong, by_flow
from tests.support.effects import EffectLog

GRACE_SECONDS = 120.0  # for what is open when the monkey stops
TICK_SECONDS, TELL_SECONDS = 0.1, 30.0


@dataclass
class Soak:
    """One run, on a broker and a database that are there."""

    processes: Processes
    broker: SoakBroker
    database: SoakDatabase
    seed: int
    say: Callable[[str], None]
    struck: list[Struck] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.effects = EffectLog(self.processes.directory / "effects.jsonl")
        environment = {BROKER: self.broker.url, DATABASE: self.database.url, EFFECTS: str(self.effects.path)}
        self.processes.environment = {**self.processes.environment, **environment}
        self.application = open_application({**os.environ, **environment})
        self.stage = Stage(self.processes)
        self.customers = Customers(self.application, random.Random(f"customers {self.seed}"))
        self.striker = Striker(self.stage, self.broker, self.application.flows.store, self.database.restart)

    def run(self, seconds: float) -> Verdict:
        """Soaks for a time. Ctrl-C ends it early; a second one while it waits for what is open ends that, too."""
        self.stage.start()
        self._began = self._told = time.monotonic()
        try:
            self._with_monkey(self._began + seconds)
        except KeyboardInterrupt:
            self.say("stopping; waits for the flows that are open")
        waited = True
        try:
            self._without_monkey(time.monotonic() + GRACE_SECONDS)
        except KeyboardInterrupt:
            self.say("stopping at once; flows that are open are not waited for")
            waited = False
        left = self.close()  # what is judged changes no more
        return self._verdict(left, waited=waited)

    def _with_monkey(self, deadline: float) -> None:
        plan = strikes(self.seed, self.striker.possible(), len(WORKERS))
        following = next(plan)
        due = time.monotonic() + following.pause_seconds
        while (now := time.monotonic()) < deadline:
            self._tick(starting=True)
            if now >= due:
                self.struck.append(self.striker.strike(following))
                following = next(plan)
                due = time.monotonic() + following.pause_seconds

    def _without_monkey(self, deadline: float) -> None:
        self.stage.thaw()
        while (self.customers.open or self.customers.anything_open()) and time.monotonic() < deadline:
            self._tick(starting=False)

    def _tick(self, *, starting: bool) -> None:
        self.stage.tick()
        self.customers.tick(starting=starting)
        if time.monotonic() - self._told >= TELL_SECONDS:
            self._told = time.monotonic()
            self._tell_progress()
        time.sleep(TICK_SECONDS)

    def _tell_progress(self) -> None:
        started, open_ = len(self.customers.started), len(self.customers.open)
        hit = sum(struck.hit for struck in self.struck)
        self.say(
            f"{time.monotonic() - self._began:5.0f} s: started {started}, ended {started - open_}, "
            f"strikes {len(self.struck)} ({hit} hit)"
        )

    def _verdict(self, left: list[Wrong], *, waited: bool) -> Verdict:
        verdict = reach_verdict(
            self.application.flows.store,
            with_children(self.application, self.customers.started),
            by_flow({key: line[key] for key in LINE} for line in self.effects.read()),
            self.struck,
            self.stage.stops,
            self.processes.directory / "evidence.jsonl",
        )
        verdict.wrongs += [*left, *(Wrong("shutdown", about) for about in self.stage.hung)]
        if not waited:
            verdict.wrongs = [wrong for wrong in verdict.wrongs if wrong.kind != "lost"]
        verdict.endings, verdict.deaths = self.stage.restarts, self.stage.deaths
        verdict.refused = self.customers.refused
        verdict.database = self.application.flows.store.engine.url.render_as_string()
        return verdict

    def close(self) -> list[Wrong]:
        """Ends all processes; gives those that would not go."""
        self.stage.close()
        return [Wrong("left", f"process {pid}") for pid in self.stage.left()]


LINE = ("effect", "at", "pid", "flow", "run_id", "label", "inline")
