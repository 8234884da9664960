"""Mirrored flows: a canvas that Celery runs as it always did, and a flow that shows what becomes of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID, uuid5

from celery.canvas import Signature, chunks
from celery.result import result_from_tuple

from celery_flows.store import (
    Flow,
    FlowError,
    FlowMode,
    FlowNotFound,
    FlowStatus,
    FlowStepStatus,
    InvalidData,
    StoreError,
    mirrors,
)
from celery_flows.store import operations as op
from celery_flows.store.models import new_id
from celery_flows.store.observations import Observation, in_order
from celery_flows.store.script import Call
from celery_flows.store.validation import check_name, check_text
from celery_flows.tasks.canvas import HEADER, mark, planned
from celery_flows.tasks.handle import FlowHandle
from celery_flows.tasks.recorder import PATIENCE_SECONDS

if TYPE_CHECKING:
    from celery_flows.tasks.runtime import Runtime

log = logging.getLogger("celery_flows.mirror")

ROOTS = UUID("6f0d4a52-9f38-5a4e-9a55-0c6a7b1f3c1d")  # the namespace of flows that a rule makes, named by root task ids


class Mirrored(NamedTuple):
    """A canvas that was applied, and the flow that mirrors it."""

    result: Any  # what the canvas's own apply_async gives: an AsyncResult, of a group a GroupResult
    flow: FlowHandle[None]


@dataclass(frozen=True, slots=True)
class MirrorRule:
    """Root tasks whose names match ``pattern`` are mirrored, with all that they bring about."""

    pattern: str
    goal: str
    owner: str

    def matches(self, task: str) -> bool:
        """Whether a root task of this name is mirrored."""
        return fnmatchcase(task, self.pattern)


def flow_id_of_root(task_id: str) -> UUID:
    """The id of the flow that a rule makes for this root task."""
    return uuid5(ROOTS, task_id)


class Mirror:
    """A canvas to be applied and mirrored. Made with :meth:`Flows.mirror`; may be applied again, as a flow of its own
    each time unless it has a key."""

    def __init__(
        self, runtime: Runtime, canvas: Signature[Any], *, name: str | None, goal: str, owner: str, key: str | None
    ) -> None:
        if not isinstance(canvas, Signature):
            raise InvalidData("canvas", f"must be a signature, chain, group or chord, not {type(canvas).__name__}")
        for field, given in ("name", name), ("key", key), ("owner", owner):
            if given is not None:
                check_name(field, given)
        check_text("goal", goal)
        self._runtime, self._canvas = runtime, canvas
        self._name, self._goal, self._owner, self._key = name, goal, owner, key

    def delay(self, *args: Any, **kwargs: Any) -> Mirrored:
        """:meth:`apply_async` with these arguments."""
        return self.apply_async(args, kwargs)

    def apply_async(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> Mirrored:
        """Stores the flow with its planned steps, then applies the canvas as Celery does; gives Celery's result and the
        flow's handle.

        With a key that is taken nothing is applied: it gives the flow that is there, and the result of its canvas.
        With the database away a canvas without a key is applied all the same, and not mirrored: the handle then finds
        no flow.

        Raises:
            InvalidData: mirroring is off, or a name or key is too long. Nothing was applied.
            StoreError: the canvas has a key, and the database could not be reached. Nothing was applied.
            Whatever Celery raises when it cannot publish; the flow has failed then.
        """
        self._check_is_on()
        flow_id = new_id()
        canvas = self._canvas.group() if isinstance(self._canvas, chunks) else self._canvas.clone()
        frozen = canvas.freeze(options.pop("task_id", None), root_id=str(flow_id))
        seen = _planned_steps(canvas, flow_id)
        mark(canvas, str(flow_id))
        options["root_id"] = str(flow_id)
        if options.get("headers"):
            options["headers"] = {**options["headers"], HEADER: str(flow_id)}
        flow = Flow(
            id=flow_id, controller_id=self._name or seen[0].task, goal=self._goal, owner_session_key=self._owner,
            idempotency_key=self._key, mode=FlowMode.MIRRORED, status=FlowStatus.RUNNING,
            state_json={} if self._key is None else {"result": frozen.as_tuple()},
        )  # fmt: skip
        if not self._is_new(flow, seen):
            return self._known(flow)
        return Mirrored(self._applied(flow_id, canvas, args, kwargs, options), FlowHandle(self._runtime, flow_id))

    def _check_is_on(self) -> None:
        if not self._runtime.mirrors:
            raise InvalidData(
                "flow_mirror", "is off, so workers would record nothing: set flow_mirror = True on the app"
            )

    def _is_new(self, flow: Flow, seen: Sequence[Observation]) -> bool:
        """Stores the flow, if the database is there; False: its key is taken."""
        silent = self._runtime.settings.mirror_silent_seconds
        create = Call(mirrors.create, (flow, in_order(seen), silent))
        try:
            created: bool = self._runtime.store.attempt(
                create, settled=Call(op.find_created, (flow,)), patience=PATIENCE_SECONDS
            )
        except StoreError as error:
            if self._key is not None:
                raise
            log.warning("a canvas of %s is applied and not mirrored (%s)", flow.controller_id, error)
            return True
        return created

    def _known(self, flow: Flow) -> Mirrored:
        assert self._key is not None
        known = self._runtime.store.run(op.find_by_key, flow.controller_id, self._key)
        if known is None:  # pruned in the very moment in between
            raise FlowNotFound(self._key)
        result = result_from_tuple(known.state_json["result"], self._runtime.app)
        return Mirrored(result, FlowHandle(self._runtime, known.id))

    def _applied(self, flow_id: UUID, canvas: Signature[Any], args: Any, kwargs: Any, options: dict[str, Any]) -> Any:
        try:
            with self._watched():
                return canvas.apply_async(args, kwargs, **options)
        except Exception:
            try:
                self._runtime.manager.fail(flow_id, "not_published")
            except FlowError as error:
                log.warning("flow %s was not published, and is not failed yet (%s)", flow_id, type(error).__name__)
            raise

    def _watched(self) -> AbstractContextManager[object]:
        """Of tasks that run here and now (``task_always_eager``) no worker tells."""
        from celery_flows.tasks.observer import observed

        return observed(self._runtime) if self._runtime.app.conf.task_always_eager else nullcontext()


def _planned_steps(canvas: Signature[Any], flow_id: UUID) -> list[Observation]:
    steps = list(planned(canvas, is_first=True))
    if not steps:
        raise InvalidData("canvas", "has no tasks")
    if any(step.task == "celery.chunks" for step in steps):
        raise InvalidData(
            "canvas", "holds chunks, which get their ids only when they are applied: use chunks(…).group()"
        )
    pending = FlowStepStatus.PENDING
    called = {True: {"parent_id": None}, False: None}  # those that are published with the canvas; the others, by nobody
    return [Observation(flow_id, step.run_id, step.task, pending, called=called[step.is_first]) for step in steps]


def settle_mirror(runtime: Runtime, flow_id: UUID) -> bool:
    """Looks at a mirrored flow that is due: ends it if it is over or silent for too long; if it is to be cancelled,
    revokes its open tasks first. Whether it has ended."""
    try:
        standing = runtime.store.run(mirrors.standing, flow_id)
        if standing is not None and standing.cancel_requested and standing.open_run_ids:
            _revoke(runtime, standing.open_run_ids)
        status = runtime.store.run(mirrors.look, flow_id, runtime.settings.mirror_silent_seconds)
    except FlowError as error:  # it is still due, and the next sweep looks again
        log.warning("mirrored flow %s is not looked at yet (%s)", flow_id, type(error).__name__)
        return False
    if status is FlowStatus.FAILED:
        log.error("mirrored flow %s has failed, or nothing was seen of it for too long", flow_id)
    return status is not None


def _revoke(runtime: Runtime, run_ids: Sequence[str]) -> None:
    try:
        with runtime.publisher.connect() as connection:
            runtime.app.control.revoke(list(run_ids), connection=connection)
    except Exception as error:  # whatever the transport raises: the flow is cancelled all the same
        log.warning("%d tasks could not be revoked (%s)", len(run_ids), type(error).__name__)
