"""The test kit moves time where statements read it; so they must read it nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

from celery_flows.store import postgresql, sqlite

STORE = Path(__file__).parents[2] / "store"
OTHER_CLOCKS = (
    r"clock_timestamp\(|transaction_timestamp\(|CURRENT_TIMESTAMP|(?<!\w)now\(\)|func\.now|datetime\('now'|julianday|"
    r"unixepoch"
)


def test_the_store_reads_the_databases_clock_by_one_expression_in_each_dialect() -> None:
    code = {
        path.name: re.sub(r'^""".*?"""', "", path.read_text(), count=1, flags=re.DOTALL) for path in STORE.rglob("*.py")
    }
    spelled = {name for name, text in code.items() if "strftime" in text.replace(sqlite.NOW, "")}

    assert [name for name, text in code.items() if re.search(OTHER_CLOCKS, text)] == []
    assert spelled == set()
    assert postgresql.NOW == "statement_timestamp()"
