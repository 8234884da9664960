"""docs/guide/going-back.md does what it says: its code is run from top to bottom, as one program."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from celery_flows import FlowFailed
from tests.support.bench import Bench

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "going-back.md"


def test_the_page_from_top_to_bottom(bench: Bench) -> None:
    away = [True]

    def pack(order_id: str) -> list[str]:
        bench.effects.append(f"pack {order_id}")
        return ["small", "large"]

    @bench.task("print_label")
    def print_label(box: str) -> str:
        bench.effects.append(f"label {box}")
        return f"label for {box}"

    def hand_to_courier(labels: list[str]) -> None:
        if away:
            raise LookupError("no courier")
        bench.effects.append("handed over")

    names: dict[str, Any] = {
        "flows": bench.flows, "pack": pack, "print_label": print_label, "hand_to_courier": hand_to_courier,
        "Session": Session, "engine": bench.store.engine,
    }  # fmt: skip
    starts, retries, forks, transaction = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    exec(compile(starts, str(PAGE), "exec"), names)
    with pytest.raises(FlowFailed):
        bench.finish(names["handle"])
    away.clear()
    bench.effects.clear()

    exec(compile(retries, str(PAGE), "exec"), names)
    assert bench.finish(names["again"]) == "order-1: 2 boxes"
    assert bench.effects == ["handed over"]
    exec(compile(forks, str(PAGE), "exec"), names)
    assert names["forked"].state() == {"packed": 2, "reprinted": True}
    assert bench.finish(names["forked"]) == "order-1: 2 boxes"
    assert bench.effects == ["handed over", "label large", "handed over"]

    exec(compile(transaction, str(PAGE), "exec"), names)

    async def mend() -> str:
        mending = asyncio.create_task(names["mend"]())
        while not mending.done():
            await asyncio.to_thread(bench.work)
        return str(await mending)

    assert asyncio.run(mend()) == "order-1: 2 boxes"
