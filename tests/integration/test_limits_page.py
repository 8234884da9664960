"""docs/guide/limits.md does what it says: its code is run from top to bottom, as one program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from celery_flows.store.tables import flow_dispatch
from tests.support.bench import Bench

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "limits.md"


def test_the_page_from_top_to_bottom(bench: Bench) -> None:
    names: dict[str, Any] = {"flows": bench.flows}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    key = '["orders/fulfil", "acme"]'
    assert bench.query(sa.select(flow_dispatch.c.limit_key).distinct()) == [(key,)]
    reminders = [names["remind"].start(f"{number}@example.com") for number in range(2)]
    counts = [names["count"].start(number) for number in range(11)]
    bench.work()
    assert [handle.result(0) for handle in names["handles"]] == [f"ORDER-{number}" for number in range(9)]
    assert all(handle.status() == "finished" for handle in reminders)
    assert sum(handle.status() == "finished" for handle in counts) == 10
