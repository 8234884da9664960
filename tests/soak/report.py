"""What is read for the verdict, flow by flow, and how the verdict is told."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from celery_flows.store import FlowNotFound, SqlFlowStore
from celery_flows.store.audit import find_orphans, verify
from celery_flows.store.operations import reads
from celery_flows.store.tables import flows
from tests.soak.application import Application, Kind
from tests.soak.monkey import Fault
from tests.soak.recovery import Recovery, Struck, worst_and_median
from tests.soak.verdict import WRONGS, Account, Judge, Line, Overtaken, Stop, Wrong
from tests.support.fold import assert_whole

SHOWN = 20


@dataclass
class Verdict:
    """What came of a soak."""

    started: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    bodies: int = 0
    wrongs: list[Wrong] = field(default_factory=list)
    overtaken: Overtaken = field(default_factory=Overtaken)
    struck: list[Struck] = field(default_factory=list)
    recovery: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    deaths: list[str] = field(default_factory=list)
    recoveries: list[Mapping[str, Any]] = field(default_factory=list)  # each, the slowest first
    database: str = ""  # its URL

    @property
    def counts(self) -> dict[str, int]:
        """How many of each kind of wrong."""
        found = Counter(wrong.kind for wrong in self.wrongs)
        return {kind: found[kind] for kind in WRONGS}

    def as_json(self) -> dict[str, Any]:
        """The verdict for machines."""
        return {
            "clean": not self.wrongs, "started": self.started, "ended": dict(self.ended), "kinds": dict(self.kinds),
            "bodies": self.bodies, "counts": self.counts, "wrongs": [str(wrong) for wrong in self.wrongs],
            "overtaken": asdict(self.overtaken), "recovery": self.recovery, "refused": dict(self.refused),
            "endings": dict(self.endings), "deaths": self.deaths, "database": self.database,
            "recoveries": self.recoveries,
            "strikes": [{"at": s.at, "fault": s.fault, "hit": s.hit, "about": s.about, "rows": len(s.rows)}
                        for s in self.struck],
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """The verdict for people."""
        yield f"{'fault':36} {'strikes':>7} {'rows hit':>8} {'median s':>9} {'worst s':>8}"
        for fault in (*Fault, "overall"):
            strikes = [each for each in self.struck if fault in (each.fault, "overall") and each.hit]
            if strikes:
                yield self._row(fault, len(strikes))
        yield f"started {self.started}: " + ", ".join(f"{count} {status}" for status, count in self.ended.items())
        yield "kinds: " + ", ".join(f"{count} {name}" for name, count in sorted(self.kinds.items()))
        yield f"bodies begun: {self.bodies}"
        yield f"processes ended and started again: {_told(self.endings)}; by themselves: {len(self.deaths)}"
        yield from self.deaths[:5]
        yield f"customers' calls that failed and were made again: {_told(self.refused)}"
        over = self.overtaken
        yield f"stopped workers that had been overtaken: began {over.began} bodies, ended {over.ended} in their hands"
        for kind, count in self.counts.items():
            yield f"{WRONGS[kind]}: {count}"
        for wrong in self.wrongs[:SHOWN]:
            yield f"WRONG: {wrong}"

    def _row(self, fault: str, strikes: int) -> str:
        figures = self.recovery[fault]
        times = [figures[name] for name in ("median_seconds", "worst_seconds")]
        median, worst = ("-" if each is None else f"{each:.2f}" for each in times)
        return f"{fault:36} {strikes:>7} {figures['rows']:>8} {median:>9} {worst:>8}"


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "none"


def reach_verdict(
    store: SqlFlowStore,
    started: Mapping[UUID, Kind],
    log: Mapping[str, list[Line]],
    struck: list[Struck],
    stops: list[Stop],
    evidence: Path | None = None,
) -> Verdict:
    """Judges every flow that was started, and audits the store. What it judged by is kept in the file ``evidence``."""
    judge, recovery = Judge(stops), Recovery(struck)
    verdict = Verdict(started=len(started), struck=struck)
    for flow_id, kind in started.items():
        account = read_account(store, flow_id, kind)
        lines = log.get(str(flow_id), [])
        if evidence is not None:
            keep_evidence(evidence, account, lines)
        verdict.wrongs += judge.judge(account, lines)
        verdict.wrongs += torn(store, flow_id)
        recovery.measure(str(flow_id), account.events)
        verdict.ended[account.flow.status.value] += 1
        verdict.kinds[kind.name] += 1
        verdict.bodies += sum(line.effect == "began" for line in lines)
    verdict.wrongs += [Wrong("history", str(found)) for found in verify(store, list(started))]
    verdict.wrongs += [Wrong("left", str(found)) for found in store.run(find_orphans)]
    verdict.overtaken = judge.overtaken
    verdict.recovery = {fault: worst_and_median(recovery.seconds(fault)) for fault in Fault}
    verdict.recovery["overall"] = worst_and_median(recovery.seconds())
    verdict.recoveries = recovery.slowest_first()
    return verdict


def with_children(application: Application, started: Mapping[UUID, Kind]) -> dict[UUID, Kind]:
    """These flows, and those that they have started."""
    kinds = {kind.name: kind for kind in application.kinds}
    children = application.flows.store.run(children_of_all)
    ours = {child: kinds[name] for child, parent, name in children if parent in started}
    return {**started, **ours}


@reads
def children_of_all(conn: sa.Connection) -> list[tuple[UUID, UUID, str]]:
    """Every child flow, its parent and its definition's name."""
    found = sa.select(flows.c.id, flows.c.parent_flow_id, flows.c.controller_id)
    return [(row[0], row[1], row[2]) for row in conn.execute(found.where(flows.c.parent_flow_id.isnot(None)))]


def read_account(store: SqlFlowStore, flow_id: UUID, kind: Kind) -> Account:
    """What the store tells of a flow."""
    flow = store.get(flow_id)
    if flow is None:
        raise FlowNotFound(flow_id)
    return Account(kind, flow, store.list_steps(flow_id), store.list_events(flow_id, None)[::-1])


def keep_evidence(path: Path, account: Account, lines: list[Line]) -> None:
    """Adds a flow with its events and effects to a file, one JSON object a line."""
    told = {
        "flow": account.flow.model_dump(mode="json"),
        "events": [event.model_dump(mode="json") for event in account.events],
        "effects": [asdict(line) for line in lines],
    }
    with path.open("a") as file:
        file.write(json.dumps(told) + "\n")


def torn(store: SqlFlowStore, flow_id: UUID) -> Iterator[Wrong]:
    """The flow's history held against its rows, by a fold that is not the audit's own."""
    try:
        assert_whole(store, flow_id)
    except AssertionError as error:
        why = (str(error).splitlines() or ["events and rows differ"])[0]
        yield Wrong("history", f"flow {flow_id}: {why}")
