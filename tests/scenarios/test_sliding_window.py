"""A long list of records, each a child flow, so many at a time, in a history that stays short. After Temporal's sliding
window batch."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from celery import Celery
from pydantic import BaseModel

from celery_flows import Flows, Run, StepFailed
from celery_flows.store.tables import flows as table
from celery_flows.testing import FlowApp, FlowCrash

app = Celery("sliding_window")
app.conf.update(task_default_queue="sliding-window")
flows = Flows(app)


class Batch(BaseModel):
    count: int
    page: int
    window: int
    offset: int = 0
    done: int = 0
    failed: list[int] = []


processed: list[int] = []


def load(offset: int, page: int, count: int) -> list[int]:
    return list(range(offset, min(offset + page, count)))


def process(record: int) -> int:
    if record % 10 == 7:
        raise ValueError(record)
    processed.append(record)
    return record


# ---- the flows ----


@flows.flow("process record")
def process_record(run: Run, record: int) -> int:
    return run.step(process, record)


@flows.flow("process batch")
def process_batch(run: Run, batch: Batch) -> Batch:
    records = run.step(load, batch.offset, batch.page, batch.count)
    if not records:
        return batch
    members = [process_record.s(record) for record in records]
    outcomes = run.gather(members, limit=batch.window, return_exceptions=True)
    failed = [record for record, each in zip(records, outcomes, strict=True) if isinstance(each, StepFailed)]
    done = batch.done + len(records) - len(failed)
    run.update(done=done, of=batch.count)
    more = {"offset": batch.offset + len(records), "done": done, "failed": batch.failed + failed}
    return run.restart_as(batch.model_copy(update=more))


# ---- its tests ----


def open_children(flow_app: FlowApp) -> int:
    query = sa.select(sa.func.count()).where(table.c.parent_flow_id.isnot(None), table.c.finished_at.is_(None))
    with flow_app.store.engine.connect() as connection:
        return int(connection.scalar(query) or 0)


def test_all_are_processed_and_never_more_at_once_than_the_window(
    flow_app: FlowApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    processed.clear()
    out: list[int] = []
    before = flow_app._runtime.before_body

    def watch(step: str) -> None:
        before(step)
        if step == "process":
            out.append(open_children(flow_app))

    monkeypatch.setattr(flow_app._runtime, "before_body", watch)
    ended = process_batch.start(Batch(count=50, page=20, window=8)).result()
    assert (ended.done, ended.failed) == (45, [7, 17, 27, 37, 47])
    assert sorted(processed) == [record for record in range(50) if record % 10 != 7]
    assert max(out) == 8


def test_no_life_has_more_history_than_a_page(flow_app: FlowApp) -> None:
    handle = process_batch.start(Batch(count=50, page=20, window=8))
    handle.result()
    lengths, flow = [], handle.get()
    while True:
        lengths.append(len(flow_app.store.list_steps(flow.id)))
        if flow.continued_as is None:
            break
        flow = flows.handle(flow.continued_as).get()
    assert lengths == [22, 22, 12, 1]


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_crash_loses_no_record(flow_app: FlowApp, flow_crash: FlowCrash, when: str) -> None:
    flow_crash.at("process", when=when)  # type: ignore[arg-type]
    assert process_batch.start(Batch(count=5, page=3, window=2)).result().done == 5
