"""What is counted and timed where flows are at work. Labels name code, never a flow, an owner or a key."""

from __future__ import annotations

from dataclasses import dataclass

PREFIX = "celery_flows_"

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0)
SWEEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """A counter, or with ``buckets`` a histogram of seconds."""

    name: str  # without the ending that says which of the two it is
    told: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


FLOWS_BEGUN = Metric("flows_begun", "Flows that a worker began to drive.", ("definition",))
FLOWS_ENDED = Metric("flows_ended", "Flows whose end a worker wrote.", ("definition", "status"))
RUN_SECONDS = Metric(
    "run_seconds", "How long a flow function ran at a stretch, its steps here included.", ("definition",), SECONDS
)
STEPS = Metric(
    "step_attempts", "Attempts of steps, by what they came to; retried: another follows.",
    ("definition", "step", "outcome"),
)  # fmt: skip
STEP_SECONDS = Metric(
    "step_seconds", "How long an attempt of a step took, its record included.", ("definition", "step"), SECONDS
)
CONFLICTS = Metric("conflicts", "Writes of drivers that met a newer revision and were made again.")
LEASES_LOST = Metric("leases_lost", "Leases that ran out or were taken over while work went on.", ("kind",))
LEASES = Metric("leases", "Leases renewed, released for a dead process, ended by a sweep, handed back.", ("what",))
MESSAGES = Metric("messages", "Messages published, or refused by the broker or left to the sweep.", ("outcome",))
SWEEP_SECONDS = Metric("sweep_seconds", "How long a sweep took.", (), SWEEP_BUCKETS)
SWEPT = Metric("swept", "What sweeps found and did.", ("what",))
GIVEN_UP = Metric("given_up", "Work that killed every worker that took it.", ("kind",))
PRUNED = Metric("pruned_flows", "Flows deleted past their retention.")
AUDITED = Metric("audited_flows", "Flows whose history was audited.")
FINDINGS = Metric("audit_findings", "What audits found wrong with histories.", ("kind",))

METRICS = tuple(value for value in list(vars().values()) if isinstance(value, Metric))


class Meter:
    """Counts nothing: what a worker has whose metrics nobody reads."""

    def add(self, metric: Metric, labels: tuple[str, ...] = (), amount: float = 1.0) -> None:
        """Adds to a counter."""

    def observe(self, metric: Metric, seconds: float, labels: tuple[str, ...] = ()) -> None:
        """Adds to a histogram."""
