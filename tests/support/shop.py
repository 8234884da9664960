"""A shop, as a user of Celery has it: its own app and tasks, and flows besides. What it does, it writes into a log."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from celery import Celery, Task, signals
from pydantic import BaseModel
from sqlalchemy.orm import Session

from celery_flows import (
    AsyncRun,
    FlowCancelled,
    FlowDefinition,
    Flows,
    FlowTimedOut,
    Limit,
    Retry,
    Run,
    StepFailed,
    StepTimedOut,
)
from celery_flows.store import SqlFlowStore
from celery_flows.store.clock import boottime
from celery_flows.store.engines import make_engine
from tests.support.effects import EffectLog

# What a shop process is told by its environment.
BROKER, DATABASE, QUEUE, EFFECTS, READY = "SHOP_BROKER", "SHOP_DATABASE", "SHOP_QUEUE", "SHOP_EFFECTS", "SHOP_READY"
USED_EARLY = "SHOP_USED_EARLY"  # there at all: the store is used at import, before the pool forks
GIVEN = "SHOP_GIVEN"  # there at all: the shop makes its store itself
CONF = "SHOP_CONF"  # settings of its Celery app, as JSON
BELLS = "SHOP_BELLS"  # seconds between two rings of its bell, a flow that the clock starts; not there: it has none
MIRRORS = "SHOP_MIRRORS"  # root tasks of these names are mirrored
JSON_LOG = "SHOP_JSON_LOG"  # there at all: its programs write their logs as JSON
DEFAULTS = "SHOP_DEFAULTS"  # there at all: durations are as in a real shop
# Short, so that tests of recovery are: a real shop leaves these as they are.
SHORT = {"flow_lease_seconds": 3, "flow_sweep_seconds": 0.2, "flow_republish_seconds": 2}
DOZE_SECONDS = 300.0  # longer than any test
AT_ONCE, STAY_SECONDS = 2, 0.3  # of the limited flow
HOLD_SECONDS = 60.0  # how long a held step holds if nobody releases it


class Order(BaseModel):
    id: str
    boxes: int = 3


@dataclass(frozen=True)
class Shop:
    """The app with its tasks and flows."""

    app: Celery
    flows: Flows
    effects: EffectLog
    fulfil: FlowDefinition[Order, dict[str, Any]]
    held_step: FlowDefinition[str, str]
    held_inline: FlowDefinition[str, str]
    many_inline: FlowDefinition[int, int]
    delayed: FlowDefinition[float, str]
    swollen: FlowDefinition[list[int], list[int]]
    private: FlowDefinition[str, str]
    retried: FlowDefinition[str, str]
    undone: FlowDefinition[str, None]
    bounded: FlowDefinition[str, list[str]]
    beside: FlowDefinition[list[str], list[str]]
    asleep: FlowDefinition[str, None]
    asleep_for_a_while: FlowDefinition[str, None]
    limited: FlowDefinition[int, int]
    greet: Task[Any, None]

    @property
    def gate(self) -> Path:
        """Held steps go on when this file is there."""
        return gate_of(self.effects)

    def open_gate(self) -> None:
        self.gate.touch()


def gate_of(effects: EffectLog) -> Path:
    return effects.path.with_name("gate")


def open_shop(environment: Mapping[str, str], **conf: Any) -> Shop:
    """The shop of this environment, in a new app."""
    app = Celery("shop", broker=environment[BROKER], set_as_current=False)
    app.conf.update({} if DEFAULTS in environment else SHORT)
    app.conf.update(
        task_default_queue=environment[QUEUE],
        flow_store_url=environment[DATABASE],
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        **conf,
    )
    app.conf.update(json.loads(environment.get(CONF, "{}")))
    flows = Flows(app, store=SqlFlowStore(make_engine(environment[DATABASE])) if GIVEN in environment else None)
    if MIRRORS in environment:
        flows.mirror_rule(environment[MIRRORS])
    effects = EffectLog(environment[EFFECTS])

    def hold(label: str) -> str:
        """Says that it began, and waits at the gate."""
        effects.append(f"{label} began", at=boottime())
        deadline = time.monotonic() + HOLD_SECONDS
        while not gate_of(effects).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        effects.append(f"{label} ended", at=boottime())
        return label

    async def hold_beside(label: str) -> str:
        """As :func:`hold`, and does not keep its siblings waiting; a quick one does not wait at all."""
        effects.append(f"{label} began")
        deadline = time.monotonic() + HOLD_SECONDS
        while label != "quick" and not gate_of(effects).exists() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        effects.append(f"{label} ended")
        return label

    def reserve(order: Order) -> list[int]:
        effects.append("reserve")
        return list(range(order.boxes))

    @app.task(name="shop.charge", shared=False)
    def charge(order_id: str) -> str:
        effects.append("charge")
        return f"payment for {order_id}"

    @app.task(name="shop.label", shared=False)
    def label(box: int) -> str:
        effects.append(f"label {box}")
        return f"label {box}"

    @app.task(name="shop.hold", shared=False)
    def hold_elsewhere(text: str) -> str:
        return hold(text)

    @app.task(name="shop.swell", shared=False)
    def swell(megabytes: int) -> int:
        """Fills that much memory, and gives back all of it."""
        filled = len(bytearray(b"x") * (megabytes << 20)) >> 20
        effects.append(f"swell {megabytes}")
        return filled

    @app.task(name="shop.echo", shared=False)
    def echo(text: str) -> str:
        return text

    @app.task(name="shop.refuse", shared=False, autoretry_for=(ValueError,), max_retries=1, default_retry_delay=0)
    def refuse(text: str) -> None:
        fail(text)

    @app.task(name="shop.stumble", shared=False, bind=True)
    def stumble(self: Task[Any, str], text: str) -> str:
        """Succeeds at its second attempt."""
        effects.append(f"{text} {self.request.retries}")
        if self.request.retries == 0:
            raise self.retry(countdown=0)
        return text

    @app.task(name="shop.dawdle", shared=False, time_limit=1)
    def dawdle() -> str:
        """Hangs at its first attempt, deaf to everything but the end of its process."""
        effects.append("dawdle")
        if effects.counts()["dawdle"] == 1:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGTERM, signal.SIGUSR1})
            time.sleep(HOLD_SECONDS)
        return "dawdled"

    def oversleep(seconds: float) -> str:
        effects.append("oversleep")
        time.sleep(seconds)
        return "overslept"

    def doze(name: str) -> None:
        """Sleeps for as long as it is let, and says when it is no more."""
        effects.append(f"{name} dozes", at=boottime())
        try:
            time.sleep(DOZE_SECONDS)
        finally:
            effects.append(f"{name} is woken", at=boottime())

    def doze_in(session: Session, name: str) -> None:
        session.execute(sa.text("CREATE TABLE dozed (id int)"))
        doze(name)

    def doze_in_database(session: Session, name: str) -> None:
        effects.append(f"{name} dozes", at=boottime())
        session.execute(sa.text("SELECT pg_sleep(:seconds)"), {"seconds": DOZE_SECONDS})

    @app.task(name="shop.doze", shared=False)
    def doze_elsewhere(name: str) -> None:
        doze(name)

    def sleep_like_a_log(name: str) -> None:
        """Whatever wakes it, it turns over."""
        while True:
            with suppress(BaseException):
                doze(name)

    @app.task(name="shop.sleep_like_a_log", shared=False)
    def log_elsewhere(name: str) -> None:
        sleep_like_a_log(name)

    @app.task(name="shop.greet", shared=False)
    def greet(name: str) -> None:
        effects.append(f"hello {name}")

    @app.task(name="shop.bundle", shared=False)
    def bundle(parts: list[str]) -> str:
        return "+".join(parts)

    @app.task(name="shop.forward", shared=False)
    def forward(name: str, *texts: str) -> None:
        """Has another task do it, once for each text."""
        for text in texts:
            app.tasks[name].delay(text)

    def tick(number: int) -> int:
        """Takes its time as long as the gate is closed."""
        effects.append(f"tick {number}")
        if not gate_of(effects).exists():
            time.sleep(0.1)
        return number

    def fail(text: str) -> None:
        raise ValueError(text)

    def note(text: str) -> str:
        effects.append(text, at=boottime())
        return text

    @flows.flow("shop/fulfil")
    def fulfil(run: Run, order: Order) -> dict[str, Any]:
        boxes = run.step(reserve, order)
        payment = run.step(charge, order.id)
        labels = run.gather(label.s(box) for box in boxes)
        run.sleep(timedelta(milliseconds=300))
        approval = run.wait_for("approval", order.id)
        return {"payment": payment, "labels": labels, "approval": approval}

    @flows.flow("shop/held step")
    def held_step(run: Run, text: str) -> str:
        run.step(note, "before")
        held: str = run.step(hold_elsewhere, text)
        run.step(note, "after")
        return held

    @flows.flow("shop/held inline")
    def held_inline(run: Run, text: str) -> str:
        run.step(note, "before")
        held = run.step(hold, text)
        run.step(note, "after")
        return held

    @flows.flow("shop/many inline")
    def many_inline(run: Run, count: int) -> int:
        return sum(run.step(tick, number) for number in range(count))

    @flows.flow("shop/delayed")
    def delayed(run: Run, seconds: float) -> str:
        run.step(note, "early")
        run.sleep(timedelta(seconds=seconds))
        return run.step(note, "on time")

    @flows.flow("shop/swollen")
    def swollen(run: Run, sizes: list[int]) -> list[int]:
        return run.gather(swell.s(megabytes) for megabytes in sizes)

    @flows.flow("shop/private")
    def private(run: Run, text: str) -> str:
        """Takes what it is told everywhere that a payload can go, and fails with it."""
        told: str = run.step(echo, text)
        for failing in (refuse, fail):
            with suppress(StepFailed):
                run.step(failing, told)
        fail(run.wait_for("letter", "private"))
        return told

    @flows.flow("shop/retried")
    def retried(run: Run, text: str) -> str:
        run.step(note, "before the retry")
        stumbled: str = run.step(stumble, text)
        run.step(note, "after the retry")
        return stumbled

    @flows.flow("shop/undone")
    def undone(run: Run, text: str) -> None:
        """Is cancelled by whoever starts it, and cleans up."""
        try:
            run.step(note, text)
        finally:
            run.step(note, f"{text} undone")

    @flows.flow("shop/bounded")
    def bounded(run: Run, kind: str) -> list[str]:
        """Each of its steps takes longer than it may."""
        told = []
        try:
            told.append(run.options(timeout=timedelta(milliseconds=300)).step(oversleep, 1.0))
        except StepTimedOut as late:
            told.append(late.message)
        if kind == "processes":
            told.append(run.options(retry=Retry(2, initial=timedelta(milliseconds=10))).step(dawdle))
        return told

    @flows.flow("shop/beside")
    async def beside(run: AsyncRun, labels: list[str]) -> list[str]:
        await run.step(note, "before")
        held = await run.gather(partial(hold_beside, label) for label in labels)
        await run.sleep(timedelta(milliseconds=100))
        await run.step(note, "after")
        return held

    def in_bed(run: Run, kind: str) -> None:
        """Takes a step that ends only if somebody ends it."""
        if kind == "inline":
            run.step(doze, kind)
        if kind == "celery":
            run.step(doze_elsewhere, kind)
        if kind == "transaction":
            run.transaction(doze_in, kind)
        if kind == "database":
            run.transaction(doze_in_database, kind)
        if kind == "gather":
            run.gather([doze_elsewhere.s(kind), doze_elsewhere.s(kind), echo.s(kind)])
        if kind == "gather inline":
            run.gather([partial(doze, kind), echo.s(kind)])
        if kind == "child":
            run.flow(asleep, "celery")
        if kind == "log inline":
            run.step(sleep_like_a_log, kind)
        if kind == "log elsewhere":
            run.step(log_elsewhere, kind)

    @flows.flow("shop/asleep")
    def asleep(run: Run, kind: str) -> None:
        """Goes to bed, and is told why it is woken."""
        run.step(note, f"{kind} begins")
        try:
            in_bed(run, kind)
        except (FlowCancelled, FlowTimedOut) as told:
            run.step(note, f"{kind}: {type(told).__name__}")
            run.step(hold, f"{kind} cleanup")
            run.step(hold_elsewhere, f"{kind} cleanup elsewhere")
            raise

    @flows.flow("shop/asleep for a while", timeout=timedelta(seconds=3))
    def asleep_for_a_while(run: Run, kind: str) -> None:
        asleep.function(run, kind)

    @app.task(name="shop.stay", shared=False)
    def stay(number: int) -> int:
        """Says when it begins and ends."""
        effects.append(f"stay {number} began", at=boottime())
        time.sleep(STAY_SECONDS)
        effects.append(f"stay {number} ended", at=boottime())
        return number

    @flows.flow("shop/limited", limit=Limit(AT_ONCE))
    def limited(run: Run, number: int) -> int:
        """Works here, and then as a Celery step."""
        run.step(stay.run, number)
        return int(run.step(stay, -number))

    if BELLS in environment:

        @flows.flow("shop/bell", schedule=float(environment[BELLS]))
        def bell(run: Run, slot: datetime) -> str:
            return run.step(note, f"bell {slot.isoformat()}")

    return Shop(
        app, flows, effects, fulfil, held_step, held_inline, many_inline, delayed, swollen, private, retried, undone,
        bounded, beside, asleep, asleep_for_a_while, limited, greet,
    )  # fmt: skip


def use_early(store: SqlFlowStore) -> None:
    """Leaves several used connections in the pool."""
    with ExitStack() as opened:
        for connection in [opened.enter_context(store.engine.connect()) for _ in range(3)]:
            connection.execute(sa.text("SELECT count(*) FROM flows"))


def tell_ready(path: Path) -> None:
    """Has a worker of this process write its process id there when it is ready."""

    def ready(**_: Any) -> None:
        path.write_text(str(os.getpid()))

    signals.worker_ready.connect(ready, weak=False)
