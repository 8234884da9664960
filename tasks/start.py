"""Application → store: a flow and the order to drive it, in one transaction."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from celery_flows.store import InvalidData, SqlFlowStore, StartPending, StoreError, starts
from celery_flows.store import operations as op
from celery_flows.store.changes import Drive
from celery_flows.store.clock import as_utc
from celery_flows.store.dispatch import drive_hint
from celery_flows.store.script import TRIES, Call, is_lock_timeout
from celery_flows.store.validation import check_name, check_priority, check_text
from celery_flows.tasks.handle import FlowHandle
from celery_flows.tasks.spans import Starting
from celery_flows.tasks.transaction import Transaction, once_committed, transaction_of

if TYPE_CHECKING:
    from celery_flows.tasks.registry import FlowDefinition
    from celery_flows.tasks.runtime import Runtime

Out = TypeVar("Out")

FARTHEST_DAYS = 36_500


@dataclass(frozen=True, slots=True)
class Options:
    """How flows are to be started: what :meth:`FlowDefinition.start` takes besides the input.

    Raises:
        InvalidData: naming the option.
    """

    owner: str = "default"
    goal: str = ""
    priority: int | None = None
    countdown: float | timedelta | None = None
    eta: datetime | None = None

    def __post_init__(self) -> None:
        check_name("owner", self.owner)
        check_text("goal", self.goal)


def start(
    runtime: Runtime,
    definition: FlowDefinition[Any, Out],
    input: Any,
    key: str | None,
    options: Options,
    session: Transaction | None,
) -> FlowHandle[Out]:
    """Stores the flow, and publishes its drive message after the commit. See :meth:`FlowDefinition.start`."""
    with runtime.watch.spans.starting(definition.name) as started:
        flow_id = _start(runtime, definition, input, key, options, session, started)
        started.tell(flow_id)
    return FlowHandle(runtime, flow_id, definition)


def _start(
    runtime: Runtime,
    definition: FlowDefinition[Any, Any],
    input: Any,
    key: str | None,
    options: Options,
    session: Transaction | None,
    started: Starting,
) -> UUID:
    if key is not None:
        check_name("key", key)
    caller = None if session is None else transaction_of(session)
    store = runtime.store if caller is None else runtime.store.using(caller)
    encoded = definition.encoded_input(input)
    drive, told = drive_row(runtime, store, definition, options, definition.limit_key(encoded))
    flow = definition.new_flow(
        deadline_at=deadline_of(store, definition, drive),
        goal=options.goal,
        owner_session_key=options.owner,
        idempotency_key=key,
        input_json=encoded,
        trace_json=started.carrier,
    )
    # Who holds the key is not waited for; a caller whose transaction this is goes on with it all the same.
    create = op.create_flow if key is None or caller is None else starts.create_flow_apart
    found, lock_tries = Call(op.find_created, (flow,)), TRIES if key is None else 0
    try:
        created = store.attempt(Call(create, (flow, told, drive)), settled=found, lock_tries=lock_tries)
    except StoreError as error:
        if key is not None and is_lock_timeout(error.__cause__):
            raise StartPending(definition.name, key) from error
        raise
    if not created:
        return store.run(starts.find_started, flow)
    if drive.published:
        once_committed(caller, lambda: runtime.publisher.publish(drive_hint(flow.id, drive)))
    return flow.id


def drive_row(
    runtime: Runtime,
    store: SqlFlowStore,
    definition: FlowDefinition[Any, Any],
    options: Options,
    limit_key: str | None = None,
) -> tuple[Drive, dict[str, Any]]:
    """The drive row of a new flow, and what its first event tells of a delay.

    Raises:
        InvalidData: the priority or the delay is none, or lies past ``flow_timer_horizon_days``.
    """
    priority = None if options.priority is None else check_priority(options.priority)
    row = definition.drive_row(limit_key, priority)
    if options.countdown is not None and options.eta is not None:
        raise InvalidData("eta", "cannot be given together with countdown")
    if (seconds := _seconds(options.countdown)) > 0:
        _check_horizon(runtime, "countdown", timedelta(seconds=seconds))
        return replace(row, first_pause=seconds, published=False), {"countdown": seconds}
    if options.eta is not None:
        eta = as_utc("eta", options.eta)
        if runtime.settings.timer_horizon_days is not None:
            _check_horizon(runtime, "eta", eta - store.run(op.now))
        return replace(row, due_at=eta, published=False), {"eta": eta.isoformat()}
    return row, {}


def deadline_of(store: SqlFlowStore, definition: FlowDefinition[Any, Any], drive: Drive) -> datetime | None:
    """When a flow has to have ended that begins as its drive row says, by the database's clock."""
    if definition.timeout is None:
        return None
    now = store.run(op.now)
    held_back = timedelta(seconds=0.0 if drive.published else drive.first_pause)
    return max(now, drive.due_at or now + held_back) + definition.timeout


def _seconds(countdown: Any) -> float:
    if countdown is None:
        return 0.0
    seconds = countdown.total_seconds() if isinstance(countdown, timedelta) else countdown
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        raise InvalidData("countdown", "must be seconds or a timedelta")
    if seconds > FARTHEST_DAYS * 86_400:
        raise InvalidData("countdown", f"is more than {FARTHEST_DAYS} days")
    return float(seconds)


def _check_horizon(runtime: Runtime, field: str, away: timedelta) -> None:
    days = runtime.settings.timer_horizon_days
    if days is not None and away > timedelta(days=days):
        raise InvalidData(field, f"is more than {days:g} days away (flow_timer_horizon_days)")
