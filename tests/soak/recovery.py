"""How long until struck work moved again. Pure.

A strike's work is the rows of ``flow_dispatch`` that it hit: those whose lease a struck process held; of faults of the
broker those that were published and waited for a worker; of faults of the database all that were held. A row has
moved again with the first event about it after the strike: of a step's row one that names its run id, of a driver's any
change of its flow but a request to cancel. A row with no such event had been done with before the strike came. What
else the monkey does meanwhile counts in: often both workers are away.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from celery_flows.store import FlowEvent
from tests.soak.monkey import Fault


@dataclass(frozen=True, slots=True)
class Row:
    """Work in hand: a row of ``flow_dispatch``."""

    run_id: str
    flow_id: str
    fence: int
    kind: str  # drive or step
    worker: str | None


@dataclass(frozen=True, slots=True)
class Struck:
    """What a strike did."""

    at: float
    fault: Fault
    hit: bool  # whether there was something to strike
    about: str
    rows: Sequence[Row] = ()


@dataclass
class Recovery:
    """The recovery times, by fault."""

    struck: Sequence[Struck]
    times: list[tuple[float, Struck, Row]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._by_flow: dict[str, list[tuple[Struck, Row]]] = defaultdict(list)
        for strike in self.struck:
            for row in strike.rows:
                self._by_flow[row.flow_id].append((strike, row))

    def measure(self, flow_id: str, events: Sequence[FlowEvent]) -> None:
        """Takes in what a flow's events tell of the strikes that hit it."""
        for strike, row in self._by_flow.get(flow_id, ()):
            moved = min((e.at.timestamp() for e in about(row, events) if e.at.timestamp() > strike.at), default=None)
            if moved is not None:
                self.times.append((moved - strike.at, strike, row))

    def seconds(self, fault: Fault | None = None) -> list[float]:
        """The recovery times of this fault; None: of all."""
        return [each for each, strike, _ in self.times if fault in (None, strike.fault)]

    def slowest_first(self) -> list[Mapping[str, Any]]:
        """Each, with what is needed to find out why."""
        ordered = sorted(self.times, key=lambda time: -time[0])
        return [
            {"seconds": each, "fault": strike.fault, "at": strike.at, **asdict(row)} for each, strike, row in ordered
        ]


def about(row: Row, events: Iterable[FlowEvent]) -> Iterator[FlowEvent]:
    """The events that tell of this row's work."""
    for event in events:
        own = event.payload_json.get("run_id") == row.run_id
        if own if row.kind == "step" else event.revision is not None and event.kind != "cancel_requested":
            yield event


def worst_and_median(times: Sequence[float]) -> Mapping[str, float | int | None]:
    """The figures of a report."""
    if not times:
        return {"rows": 0, "median_seconds": None, "worst_seconds": None}
    return {"rows": len(times), "median_seconds": round(median(times), 3), "worst_seconds": round(max(times), 3)}
