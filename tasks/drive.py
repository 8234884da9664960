"""Driving: claims a flow, runs its function from the top, and writes how it ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from uuid import UUID

from celery_flows.store import FlowStatus, LeaseLost, dispatch, transitions
from celery_flows.store.clock import boottime
from celery_flows.store.script import Call
from celery_flows.tasks.admission import admitted, give_on
from celery_flows.tasks.call import call_flow
from celery_flows.tasks.driver import Driver
from celery_flows.tasks.errors import FlowCancelled
from celery_flows.tasks.failures import of_flow
from celery_flows.tasks.lease import UNKNOWN_PAUSE_SECONDS, let_go, passed_on
from celery_flows.tasks.metrics import LEASES_LOST
from celery_flows.tasks.registry import FlowDefinition
from celery_flows.tasks.replay import Replay, Suspended
from celery_flows.tasks.run import Run
from celery_flows.tasks.runtime import Runtime, claim_token

log = logging.getLogger("celery_flows.drive")


def drive(runtime: Runtime, flow_id: UUID, worker: str) -> None:
    """Drives the flow until it waits, ends, or belongs to somebody else. A duplicate message finds nothing to claim."""
    while not passed_on(runtime, str(flow_id)) and (driver := _claimed(runtime, flow_id, worker)) is not None:
        is_due = _is_due_after(driver)
        if (key := driver.claim.limit_key) is not None and not driver.kept_slot:
            give_on(runtime, key, driver.flow.controller_id)
        if not is_due:
            return


def _claimed(runtime: Runtime, flow_id: UUID, worker: str) -> Driver | None:
    asked_at = boottime()
    lease = runtime.settings.lease_seconds
    arguments = (flow_id, claim_token(worker), lease)
    claiming = Call(dispatch.claim_drive, arguments)
    claim = runtime.store.attempt(claiming, again={"repeat": True})
    if claim is None and admitted(runtime, flow_id):
        asked_at = boottime()
        claim = runtime.store.attempt(claiming, again={"repeat": True})
    return None if claim is None else Driver(runtime, claim, asked_at)


def _is_due_after(driver: Driver) -> bool:
    """Runs the flow function under this claim; True: the flow is due again already, claim it anew."""
    name, version = driver.flow.controller_id, driver.flow.definition_version
    definition = driver.runtime.registry.get(name, version)
    if definition is None:
        log.error(
            "no flow definition %r, version %d, here; flow %s waits for a worker that has it",
            name, version, driver.flow.id,
        )  # fmt: skip
        driver.runtime.store.run(dispatch.hand_back, driver.holder, UNKNOWN_PAUSE_SECONDS)
        return False
    try:
        with driver.runtime.watch.run(driver):
            Pass(driver, definition).run()
    except Suspended:
        if (error := driver.interruption) is not None:  # the function caught it, or went on all the same
            let_go(driver.runtime, driver.holder, error)
            raise error from None
    except LeaseLost as lost:
        driver.runtime.watch.meter.add(LEASES_LOST, ("drive",))
        log.info("%s", lost)
    except BaseException as error:
        let_go(driver.runtime, driver.holder, error)
        raise
    finally:
        driver.loop.close()
    return driver.is_due_again


class Pass:
    """One run of a flow function, from its top to where it suspends or ends."""

    def __init__(self, driver: Driver, definition: FlowDefinition[Any, Any]) -> None:
        self._driver, self._definition = driver, definition
        driver.defaults = definition.defaults
        self._replay = Replay(driver)
        self._run = Run(self._replay)

    def run(self) -> None:
        """Runs the function, and writes how the flow ends if it does.

        Raises:
            Suspended, LeaseLost: it does not, under this claim.
        """
        driver = self._driver
        driver.read_history()
        if (driver.cancel_requested or driver.is_late()) and not driver.cleanup_is_out():
            driver.drain()
            driver.read_history()
        try:
            result = call_flow(self._definition, self._replay, self._run)
        except Exception as error:
            self._end_badly(driver.timed_out or error)
            return
        if driver.timed_out is not None or driver.cancel_requested:
            self._end_badly(driver.timed_out or FlowCancelled(driver.flow.id))
            return
        self._replay.finish()
        finished = {"status": FlowStatus.FINISHED, "result_json": result, "wait_json": None}
        try:
            self._end(lambda: ("finished", finished))
        except FlowCancelled as cancelled:
            self._end_badly(cancelled)

    def _end(
        self, outcome: Callable[[], tuple[str, dict[str, Any]]], *, illegal_after_cancel: bool = True, **more: Any
    ) -> None:
        """The last write.

        Raises:
            FlowCancelled: cancel was requested, and nothing else may be the end.
        """
        driver = self._driver
        if driver.is_over:  # the function caught what was to unwind it
            raise Suspended
        driver.end(outcome, illegal_after_cancel=illegal_after_cancel, **more)

    def _end_badly(self, error: Exception) -> None:
        """Undoes what is to be undone, once nothing of the flow is at work any more; then the flow has failed, or is
        cancelled."""
        driver = self._driver
        if driver.is_over:
            raise Suspended
        if driver.open_members and not driver.cleanup_is_out():
            driver.drain()
        undo_failed = self._run.clean_up()
        if not isinstance(error, FlowCancelled):
            log.warning("flow %s of %r failed: %s", driver.flow.id, driver.flow.controller_id, type(error).__name__)
            try:
                self._end_failed(error, undo_failed)
            except FlowCancelled as cancelled:
                error = cancelled
            else:
                return
        columns: dict[str, Any] = {"status": FlowStatus.CANCELLED, "cancel_requested": True, "wait_json": None}
        if undo_failed:
            columns["error_json"] = _told(error, undo_failed)
        payload = {"undo_failed": undo_failed} if undo_failed else {}
        self._end(lambda: ("cancelled", columns), illegal_after_cancel=False, payload=payload)

    def _end_failed(self, error: Exception, undo_failed: list[str]) -> None:
        def failed() -> tuple[str, dict[str, Any]]:
            flow = self._driver.flow.model_copy(update={"state_json": self._driver.state, "status": FlowStatus.RUNNING})
            failure = transitions.fail(flow, type(error).__name__, _told(error, undo_failed))
            return failure.kind, failure.columns

        self._end(failed)


def _told(error: BaseException, undo_failed: list[str]) -> dict[str, Any]:
    told = of_flow(error)
    return {**told, "undo_failed": undo_failed} if undo_failed else told
