"""What is pruned and when, by settings and by definitions; and what goes into an archive first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from celery_flows import Flow, FlowFailed, FlowHandle, InvalidData, JsonLinesFile, Run
from celery_flows.store import pruning
from celery_flows.tasks import maintenance
from tests.integration.conftest import MakeBench
from tests.support.bench import Bench

DAY = timedelta(days=1)


def ended(bench: Bench, retain: timedelta | None = None, *, fails: bool = False, name: str = "kept") -> FlowHandle[Any]:
    """A flow that has ended, of a definition that says this."""

    @bench.flows.flow(f"{name}/{retain}/{fails}", retain=retain)
    def flow(run: Run) -> int:
        return run.step(lambda: 1 // (0 if fails else 1))

    handle = flow.start()
    if fails:
        with pytest.raises(FlowFailed):
            bench.finish(handle)
    else:
        bench.finish(handle)
    return handle


def left(bench: Bench, *handles: FlowHandle[Any]) -> list[bool]:
    return [bench.store.get(handle.id) is not None for handle in handles]


def test_a_definition_says_how_long_its_flows_are_kept(make_bench: MakeBench) -> None:
    bench = make_bench(retain_days=0)
    flows = ended(bench), ended(bench, DAY), ended(bench, timedelta(0)), ended(bench, DAY, fails=True)
    assert maintenance.prune(bench.runtime) == 2
    assert left(bench, *flows) == [False, True, False, True]


def test_failures_are_kept_for_longer(make_bench: MakeBench) -> None:
    bench = make_bench(retain_days=0, retain_failed_days=1)
    flows = ended(bench), ended(bench, fails=True)
    assert maintenance.prune(bench.runtime) == 1
    assert left(bench, *flows) == [False, True]
    assert maintenance.prune(bench.runtime, 0) == 1


@pytest.mark.parametrize(
    ("said", "days"), [({}, (30, 90)), ({"retain_days": 7}, (7, 21)), ({"retain_failed_days": 1}, (30, 1))]
)
def test_what_is_set_and_what_follows_from_it(
    make_bench: MakeBench, said: dict[str, int], days: tuple[int, int]
) -> None:
    assert maintenance.retention(make_bench(**said).runtime) == pruning.Retention(*days)


def test_a_worker_that_does_not_know_a_definition_keeps_its_flows_as_long(make_bench: MakeBench) -> None:
    handle = ended(make_bench(), DAY)
    stranger = make_bench(retain_days=0)
    assert maintenance.prune(stranger.runtime) == 0
    assert left(stranger, handle) == [True]


def test_the_retention_goes_with_children_successors_and_many(bench: Bench) -> None:
    @bench.flows.flow("child", retain=DAY)
    def child(run: Run) -> int:
        return 1

    @bench.flows.flow("parent")
    def parent(run: Run) -> int:
        return run.flow(child)

    @bench.flows.flow("endless", retain=2 * DAY)
    def endless(run: Run, life: int) -> None:
        if life < 2:
            run.restart_as(life + 1)

    bench.finish(parent.start())
    first = endless.start(1)
    bench.drive(first.id)
    many = child.start_many([None, None])
    kept = {flow.id: flow.retain_seconds for flow in bench.flows.search()}
    assert [kept[first.id], *(kept[each.id] for each in many)] == [172_800, 86_400, 86_400]
    assert sorted(map(str, kept.values())) == ["172800", "172800", "86400", "86400", "86400", "None"]
    bench.work()


@pytest.mark.parametrize("retain", [timedelta(seconds=-1), 30, "30 days"])
def test_a_retention_that_is_none_is_refused(bench: Bench, retain: Any) -> None:
    with pytest.raises(InvalidData, match=r"^retain of flow wrong: must be a timedelta"):
        bench.flows.flow("wrong", retain=retain)(lambda run: None)


def test_what_is_deleted_goes_into_the_archive_first(bench: Bench, tmp_path: Path) -> None:
    bench.flows.archive(JsonLinesFile(tmp_path / "flows.jsonl"))
    flows = [ended(bench, timedelta(0), fails=fails, name=name) for name in "ab" for fails in (False, True)]
    ended(bench, DAY)
    expected = {str(handle.id): handle.get() for handle in flows}
    assert maintenance.prune(bench.runtime) == len(flows)
    written = (tmp_path / "flows.jsonl").read_text().splitlines()
    archived = {line["flow"]["id"]: line for line in map(json.loads, written)}
    assert {id_: Flow(**line["flow"]) for id_, line in archived.items()} == expected
    assert len(written) == len(flows)
    for line in archived.values():
        assert [step["flow_id"] for step in line["steps"]] == [line["flow"]["id"]]
        assert [event["revision"] for event in line["events"]] == list(range(1, len(line["events"]) + 1))
    assert (tmp_path / "flows.jsonl").stat().st_mode & 0o777 == 0o600


def test_what_the_archive_does_not_take_is_not_deleted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "BATCH", 2)
    flows = [ended(bench, timedelta(0), name=str(number)) for number in range(5)]
    taken: list[str] = []

    @bench.flows.archive
    def keep(lines: Sequence[str]) -> None:
        if len(taken) == 2:
            raise OSError("the disk is full")
        taken.extend(lines)

    with pytest.raises(OSError, match="full"):
        maintenance.prune(bench.runtime)
    assert {json.loads(line)["flow"]["id"] for line in taken} == {
        str(handle.id) for handle, there in zip(flows, left(bench, *flows), strict=True) if not there
    }
    assert left(bench, *flows).count(True) == 3


def test_what_would_be_pruned_is_counted_and_stays(make_bench: MakeBench) -> None:
    bench = make_bench(retain_days=0)
    flows = ended(bench), ended(bench, DAY), ended(bench, fails=True)
    assert (maintenance.count_prunable(bench.runtime), maintenance.count_prunable(bench.runtime, most=1)) == (2, 1)
    assert left(bench, *flows) == [True, True, True]


def test_progress_is_told_after_each_batch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "BATCH", 2)
    for number in range(5):
        ended(bench, timedelta(0), name=str(number))
    told: list[int] = []
    assert maintenance.prune(bench.runtime, progress=told.append) == 5
    assert told == [2, 4, 5]
