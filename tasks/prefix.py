"""What a flow that goes back takes over of another's history: which steps, and under which run ids. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any
from uuid import UUID

from celery_flows.store import Flow, FlowStep, FlowStepStatus, InvalidData
from celery_flows.store.models import new_id
from celery_flows.store.taking_over import Origin, Taken
from celery_flows.tasks.errors import WaitTimedOut
from celery_flows.tasks.failures import failure_of
from celery_flows.tasks.payloads import describe
from celery_flows.tasks.replay import FORK, given_as, is_cleanup, is_wait, run_id_by, run_id_of
from celery_flows.tasks.wait_steps import WAIT_TIMED_OUT

LISTED = 30  # step names that an error tells


def own_steps(origin: Origin) -> list[FlowStep]:
    """The steps that the flow function took, but for those of cleaning up, in the order of their places; those that
    are known by a key come last. What was observed from outside, and what the engine notes, is none of them."""
    own = (step for step in origin.steps if not is_cleanup(step) and (step.position or key_of(step) is not None))
    return sorted(own, key=lambda step: (step.position == 0, step.position, origin.told[step.run_id].first))


def key_of(step: FlowStep) -> str | None:
    """The key by which the step is known, if it has no place."""
    return step.args_json.get("key") if not step.position and isinstance(step.args_json, Mapping) else None


# ---- which ----------------------------------------------------------------------------------------------------------


def find_step(origin: Origin, wanted: str) -> FlowStep:
    """The step that is called so: by its name, the first of these; as ``name#2``, the second; or by its run id.

    Raises:
        InvalidData: there is none; lists those there are.
    """
    steps = own_steps(origin)
    name, _, number = wanted.rpartition("#")
    for named, count in (wanted, 1), (name, int(number) if number.isdecimal() else 0):
        same = [step for step in steps if step.task == named]
        if 0 < count <= len(same):
            return same[count - 1]
    for step in steps:
        if step.run_id == wanted:
            return step
    raise InvalidData("from_step", f"is no step that flow {origin.flow.id} took; these are: {_names(steps)}")


def _names(steps: Sequence[FlowStep]) -> str:
    counts = Counter(step.task for step in steps)
    names = [name if count == 1 else f"{name}#1 to {name}#{count}" for name, count in counts.items()]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more if names else "none"


def before(origin: Origin, step: FlowStep) -> list[FlowStep]:
    """What a fork at this step takes over: the steps with an earlier place that have succeeded or failed. Where the
    step or another is known by its key, it counts which had ended before this one began."""
    began = origin.told[step.run_id].first

    def is_before(other: FlowStep) -> bool:
        if step.position and other.position:
            return other.position < step.position
        return other is not step and origin.told[other.run_id].last < began

    return [other for other in own_steps(origin) if _is_told(other) and is_before(other)]


def until_failure(origin: Origin) -> list[FlowStep]:
    """What a retry takes over: what has succeeded, and what failed if the flow then took another step, for it was
    handled. Not the failure that the flow failed of, although it may have been caught and raised again; then none of
    the steps that followed it either."""
    steps = own_steps(origin)
    causes = [step for step in steps if _has_failed(step) and _is_failure_of(origin.flow, step)]
    if causes:
        cause = max(causes, key=lambda step: origin.told[step.run_id].last)
        steps = [step for step in steps if step is not cause and not _followed(origin, step, cause)]
    latest = _latest(origin, steps)
    return [step for step in steps if _is_told(step) and (not _has_failed(step) or _was_handled(origin, latest, step))]


def _has_failed(step: FlowStep) -> bool:
    return step.status is FlowStepStatus.FAILED


def _is_told(step: FlowStep) -> bool:
    # A step that was cancelled told the function nothing, or that the flow was cancelled, which this one is not.
    return step.status in (FlowStepStatus.SUCCEEDED, FlowStepStatus.FAILED)


def _was_handled(origin: Origin, latest: Iterable[FlowStep], failed: FlowStep) -> bool:
    return origin.told[failed.run_id].taken_over or any(_followed(origin, step, failed) for step in latest)


def _followed(origin: Origin, step: FlowStep, failed: FlowStep) -> bool:
    """Whether the function took the step when it knew of the failure. What it knew had been recorded, so is of a lower
    id; but a member of a gather knows nothing of the others, whatever has become of them when it begins."""
    ended, began = origin.told[failed.run_id].last, origin.told[step.run_id].first
    return began > ended and (_gather_of(step) is None or _gather_of(step) != _gather_of(failed))


def _latest(origin: Origin, steps: Sequence[FlowStep]) -> list[FlowStep]:
    """The step that was taken last, and the last outside of its gather: if any followed a failure, one of these did."""
    began = sorted(steps, key=lambda step: origin.told[step.run_id].first, reverse=True)
    outside = (step for step in began if _gather_of(step) is None or _gather_of(step) != _gather_of(began[0]))
    return [*began[:1], *islice(outside, 1)]


def _gather_of(step: FlowStep) -> int | None:
    return step.args_json.get("gather") if isinstance(step.args_json, Mapping) else None


def _is_failure_of(flow: Flow, step: FlowStep) -> bool:
    """Whether the flow failed with just what this step raised."""
    told = flow.error_json or {}
    if is_wait(step) and (step.error_json or {}).get("type") == WAIT_TIMED_OUT:
        raised: Exception = WaitTimedOut(step.args_json["topic"], step.args_json["correlation_id"])
    else:
        raised = failure_of(step.task, step.error_json)
    return describe(raised) == {name: told.get(name) for name in ("type", "message")}


# ---- as what --------------------------------------------------------------------------------------------------------


def state_after(origin: Origin, steps: Sequence[FlowStep]) -> dict[str, Any]:
    """The flow's state as the last of these steps that updated it left it."""
    updates = (origin.states[step.run_id] for step in reversed(steps) if step.run_id in origin.states)
    return next(updates, origin.first_state)


def taken_over(
    origin: Origin, steps: Sequence[FlowStep], flow_id: UUID, state: dict[str, Any] | None = None
) -> list[Taken]:
    """The steps as those of the flow ``flow_id``, which has been given ``state`` in place of what they left.

    Raises:
        InvalidData: a step's run id is none that this engine gave.
    """
    counts: Counter[tuple[str, str | None]] = Counter()
    taken = []
    # In the order in which they were recorded, for a later fork of this one to go by.
    run_ids = {step.run_id: _run_id(origin.flow.id, flow_id, step, counts) for step in steps}
    for step in sorted(steps, key=lambda step: origin.told[step.run_id].last):
        left = origin.states.get(step.run_id)
        # The result of a child is the flow's; the child is not: it stays with its parent.
        row = {"id": new_id(), "flow_id": flow_id, "run_id": run_ids[step.run_id], "child_session_key": None}
        taken.append(Taken(step.model_copy(update=row), left if left is None or state is None else state))
    return [*taken, Taken(_drawn(origin, steps, flow_id))] if taken else []


def _run_id(old_id: UUID, flow_id: UUID, step: FlowStep, counts: Counter[tuple[str, str | None]]) -> str:
    """The step's run id in the flow; the steps are asked for in the order of their places."""
    if (key := key_of(step)) is not None:
        return run_id_by(flow_id, step.task, key)
    names = step.task, given_as(step)
    for count in range(counts[names] + 1, step.position + 1):
        if run_id_of(old_id, step.task, count, given_as(step)) == step.run_id:
            counts[names] = count
            return run_id_of(flow_id, step.task, count, given_as(step))
    raise InvalidData(f"step {step.task}", f"has a run id that its flow did not give it: {step.run_id}")


def _drawn(origin: Origin, steps: Sequence[FlowStep], flow_id: UUID) -> FlowStep:
    """The step that says until which number of steps ``run.uuid()`` and ``run.random()`` are as in which flow."""
    reached = max(step.position for step in steps) + sum(step.position == 0 for step in steps)
    known = next((step for step in origin.steps if step.run_id == run_id_of(origin.flow.id, FORK, 1)), None)
    drawn = [] if known is None else [[each, min(count, reached)] for each, count in known.args_json["drawn"]]
    if not drawn or drawn[-1][1] < reached:
        drawn.append([str(origin.flow.id), reached])
    at = max(step.updated_at for step in steps)
    return FlowStep(
        flow_id=flow_id, run_id=run_id_of(flow_id, FORK, 1), task=FORK, status=FlowStepStatus.SUCCEEDED,
        created_at=at, updated_at=at, args_json={"drawn": drawn},
    )  # fmt: skip
