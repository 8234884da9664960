"""A shop, as a user of Celery has it: its own app and tasks, and flows besides. What it does, it writes into a log."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from celery import Celery, Task, signals
from pydantic import BaseModel

from celery_flows import FlowDefinition, Flows, Run
from tests.support.effects import EffectLog

# What a shop process is told by its environment.
BROKER, DATABASE, QUEUE, EFFECTS, READY = "SHOP_BROKER", "SHOP_DATABASE", "SHOP_QUEUE", "SHOP_EFFECTS", "SHOP_READY"
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
    app.conf.update(
        task_default_queue=environment[QUEUE],
        flow_store_url=environment[DATABASE],
        # Short, so that tests of recovery are: a real shop leaves these as they are.
        flow_lease_seconds=3,
        flow_sweep_seconds=0.2,
        flow_republish_seconds=2,
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        **conf,
    )
    flows = Flows(app)
    effects = EffectLog(environment[EFFECTS])

    def hold(label: str) -> str:
        """Says that it began, and waits at the gate."""
        effects.append(f"{label} began")
        deadline = time.monotonic() + HOLD_SECONDS
        while not gate_of(effects).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
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

    @app.task(name="shop.greet", shared=False)
    def greet(name: str) -> None:
        effects.append(f"hello {name}")

    def note(text: str) -> str:
        effects.append(text)
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

    return Shop(app, flows, effects, fulfil, held_step, held_inline, greet)


def tell_ready(path: Path) -> None:
    """Has a worker of this process write its process id there when it is ready."""

    def ready(**_: Any) -> None:
        path.write_text(str(os.getpid()))

    signals.worker_ready.connect(ready, weak=False)
