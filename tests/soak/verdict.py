"""What is wrong with a flow, by its events and by the log of what really ran. Pure: it reads nothing.

Database and processes share the machine's clock; times are compared in whole milliseconds, as SQLite keeps them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from math import inf
from typing import Any

from celery_flows import FlowStatus, FlowStepStatus
from celery_flows.store import Flow, FlowEvent, FlowStep
from celery_flows.store.transitions import NEXT
from tests.soak.application import ELSEWHERE, HERE, Kind

THAWED_SECONDS = 1.0  # an overtaken worker that was frozen just before a body begins it within this time
CLOSED = ("step_succeeded", "step_failed", "step_cancelled")
WRONGS = {
    "lost": "flows that have not ended",
    "again": "bodies that began though their step was recorded already",
    "unclaimed": "bodies that began without a claim of their process",
    "unfounded": "steps recorded as succeeded whose body never ended",
    "history": "histories that are illegal, or differ from their rows",
    "outcome": "flows that ended otherwise than they must",
    "event": "events that were handed over twice",
    "shutdown": "workers that did not stop when told to",
    "left": "processes and rows that were left behind",
}


@dataclass(frozen=True, slots=True)
class Wrong:
    """Something that must not be. ``kind`` is one of the keys of :data:`WRONGS`."""

    kind: str
    about: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.about}"


@dataclass(frozen=True, slots=True)
class Line:
    """What a body left in the effect log."""

    effect: str  # began, ended, failed
    at: float
    pid: int
    flow: str
    run_id: str
    label: str
    inline: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """A process that the monkey had stopped for a time."""

    pid: int
    since: float
    until: float


@dataclass(frozen=True, slots=True)
class Account:
    """What the store tells of one flow."""

    kind: Kind
    flow: Flow
    steps: Sequence[FlowStep]
    events: Sequence[FlowEvent]  # oldest first


@dataclass
class Overtaken:
    """What workers did that had been stopped, after others had taken over: allowed, and shown."""

    began: int = 0  # a body, the only one, in the moment that they went on
    ended: int = 0  # the body in their hands, after its step was recorded

    def __iadd__(self, other: Overtaken) -> Overtaken:
        return Overtaken(self.began + other.began, self.ended + other.ended)


@dataclass
class Judge:
    """Judges flows one by one; keeps what concerns more than one of them."""

    stops: Sequence[Stop]
    overtaken: Overtaken = field(default_factory=Overtaken)
    _excused: set[Stop] = field(default_factory=set)
    _heard: dict[int, str] = field(default_factory=dict)  # event → the flow it was handed to

    def judge(self, account: Account, lines: Sequence[Line]) -> Iterator[Wrong]:
        """What is wrong with a flow."""
        yield from outcome(account)
        yield from illegal(account)
        yield from unclaimed(account, lines)
        yield from unfounded(account, lines)
        yield from self._ran_again(account, lines)
        yield from self._heard_twice(account)

    def _ran_again(self, account: Account, lines: Sequence[Line]) -> Iterator[Wrong]:
        """Bodies that began after their step, or the flow itself, was closed. An overtaken worker that was frozen in
        the instant between its last look at its lease and the body may still begin that one."""
        recorded = closings(account)
        for line in lines:
            closed = min(filter(None, (recorded.get(line.run_id), recorded.get(line.flow))), default=None)
            if closed is None or milliseconds(line.at) <= milliseconds(closed):
                continue
            if line.effect != "began":
                self.overtaken.ended += 1
            elif (stop := self._thawed(line)) is not None:
                self._excused.add(stop)
                self.overtaken.began += 1
            else:
                about = f"{line.label} of {account.kind.name} began in {line.pid} {line.at - closed:.3f} s after that"
                yield Wrong("again", f"flow {line.flow}: {about}, run id {line.run_id}")

    def _thawed(self, line: Line) -> Stop | None:
        """The stop that explains it; each explains one body."""
        fitting = (
            stop for stop in self.stops if stop.pid == line.pid and stop.until <= line.at <= stop.until + THAWED_SECONDS
        )
        return next((stop for stop in fitting if stop not in self._excused), None)

    def _heard_twice(self, account: Account) -> Iterator[Wrong]:
        for number in heard(account.flow):
            first = self._heard.setdefault(number, str(account.flow.id))
            if first != str(account.flow.id):
                yield Wrong("event", f"event {number} was handed to flow {first} and to flow {account.flow.id}")


def heard(flow: Flow) -> list[int]:
    """The events that a finished flow was handed."""
    if not isinstance(flow.result_json, Mapping):
        return []
    return [number for number in flow.result_json.get("heard", []) if number is not None]


def outcome(account: Account) -> Iterator[Wrong]:
    """A flow ends, as one of its kind must, with the results of its own steps."""
    flow, kind = account.flow, account.kind
    about = f"flow {flow.id} of {kind.name} is {flow.status}"
    if not flow.status.is_terminal:
        yield Wrong("lost", f"{about}, current step {flow.current_step}, waits for {flow.wait_json}")
    elif flow.status not in kind.ends:
        yield Wrong("outcome", f"{about}: {flow.error_json}")
    elif flow.status is FlowStatus.FINISHED:
        result = flow.result_json if isinstance(flow.result_json, Mapping) else {}
        got = len(heard(flow)) if kind.patient else len(result.get("heard", []))
        if result.get("did") != list(kind.did) or got != kind.hears:
            yield Wrong("outcome", f"{about} with {flow.result_json}")
    elif flow.status is FlowStatus.CANCELLED:
        yield from not_undone(account)


def not_undone(account: Account) -> Iterator[Wrong]:
    """A flow that was cancelled has undone what it did, unless it was asked too late to be told: in its last step."""
    results = [step.result_json for step in account.steps if step.status is FlowStepStatus.SUCCEEDED]
    succeeded = {label for label in results if isinstance(label, str)}
    missing = set(account.kind.undoes) - succeeded
    too_late = succeeded.issuperset(account.kind.did[-1:]) and recorded_since_cancel(account) <= 1
    if missing and not too_late:
        yield Wrong("outcome", f"flow {account.flow.id} was cancelled without {sorted(missing)}")


def recorded_since_cancel(account: Account) -> float:
    """How many steps a driver has recorded since the flow was asked to cancel; it learns that with the first."""
    asked = [event.revision or 0 for event in account.events if event.kind == "cancel_requested"]
    if not asked:
        return inf
    return sum(event.kind == "step_succeeded" and (event.revision or 0) > asked[0] for event in account.events)


def illegal(account: Account) -> Iterator[Wrong]:
    """Every change of status is one that the lifecycle knows, and nothing follows the end."""
    changes = sorted((e for e in account.events if e.revision is not None), key=lambda e: e.revision or 0)
    before: FlowStatus | None = None
    for event in changes:
        told = event.payload_json.get("set", {}).get("status")
        status = before if told is None else FlowStatus(told)
        if before is not None and before.is_terminal:
            yield Wrong("history", f"flow {event.flow_id}: {event.kind} (revision {event.revision}) after its end")
        elif before is not None and status is not None and status is not before and status not in NEXT[before]:
            yield Wrong("history", f"flow {event.flow_id}: from {before} to {status} by {event.kind}")
        before = status


def closings(account: Account) -> dict[str, float]:
    """When each step was closed, by run id, and when the flow was, by its id."""
    closed: dict[str, float] = {}
    for event in account.events:
        if event.kind in CLOSED and "run_id" in event.payload_json:
            closed.setdefault(event.payload_json["run_id"], seconds(event.at))
        if FlowStatus(event.payload_json.get("set", {}).get("status", FlowStatus.RUNNING)).is_terminal:
            closed.setdefault(str(event.flow_id), seconds(event.at))
    return closed


def unclaimed(account: Account, lines: Iterable[Line]) -> Iterator[Wrong]:
    """A process begins a body no more often than it claimed the step, or the flow whose step it is."""
    began = Counter((line.run_id, line.pid, line.inline) for line in lines if line.effect == "began")
    claims: Counter[tuple[str, int]] = Counter()
    for event in account.events:
        if "worker" in event.payload_json:
            of = event.payload_json.get("run_id", str(event.flow_id))
            claims[of, pid_of(event.payload_json["worker"])] += 1
    for (run_id, pid, inline), times in began.items():
        allowed = claims[str(account.flow.id) if inline else run_id, pid]
        if times > allowed:
            about = f"run id {run_id} began {times} times in {pid}, which claimed it {allowed} times"
            yield Wrong("unclaimed", f"flow {account.flow.id}: {about}")


def unfounded(account: Account, lines: Iterable[Line]) -> Iterator[Wrong]:
    """What is recorded as done was done, before it was recorded."""
    first: dict[str, float] = {}
    for line in lines:
        if line.effect == "ended":
            first[line.run_id] = min(line.at, first.get(line.run_id, line.at))
    recorded = closings(account)
    for step in account.steps:
        ours = step.task.partition(".retr")[0] in (HERE, ELSEWHERE) and step.status is FlowStepStatus.SUCCEEDED
        ended = first.get(step.run_id)
        if ours and (ended is None or milliseconds(ended) > milliseconds(recorded.get(step.run_id, 0))):
            yield Wrong("unfounded", f"flow {account.flow.id}: step {step.result_json}, run id {step.run_id}")


def pid_of(worker: str) -> int:
    """The process in a claim's token: node, boot, application, process, request, claim."""
    return int(worker.split("/")[-3])


def seconds(at: datetime) -> float:
    return at.timestamp()


def milliseconds(at: float) -> int:
    return int(at * 1000 + 1e-6)


def by_flow(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[Line]]:
    """The effect log, flow by flow."""
    found: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        found[line["flow"]].append(Line(**line))
    return found
