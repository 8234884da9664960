"""Durable workflows for teams that already run Celery and PostgreSQL."""

from celery_flows.store import (
    AlreadyTerminal,
    CancelPending,
    DuplicateFlow,
    DuplicateStep,
    Flow,
    FlowError,
    FlowEvent,
    FlowManager,
    FlowNotFound,
    FlowStatus,
    FlowStep,
    FlowStepStatus,
    FlowStore,
    IllegalTransition,
    InvalidData,
    KeyConflict,
    RevisionMismatch,
    SchemaOutdated,
    SqlFlowStore,
    StartPending,
    StoreError,
)
from celery_flows.tasks.approval import Approval
from celery_flows.tasks.archive import JsonLinesFile
from celery_flows.tasks.awaited import Decision, Event, Timer
from celery_flows.tasks.errors import (
    FlowCancelled,
    FlowFailed,
    FlowTimedOut,
    HistoryMismatch,
    ResultTimedOut,
    StepFailed,
    StepLost,
    StepTimedOut,
    UnknownFlow,
    WaitTimedOut,
)
from celery_flows.tasks.gather import First
from celery_flows.tasks.handle import FlowHandle
from celery_flows.tasks.limit import Limit
from celery_flows.tasks.options import step
from celery_flows.tasks.registry import FlowDefinition
from celery_flows.tasks.retry import Permanent, Retry
from celery_flows.tasks.run import Run
from celery_flows.tasks.run_async import AsyncRun
from celery_flows.tasks.settings import FlowSettings
from celery_flows.worker.flows import Flows

__all__ = [
    "AlreadyTerminal",
    "Approval",
    "AsyncRun",
    "CancelPending",
    "Decision",
    "DuplicateFlow",
    "DuplicateStep",
    "Event",
    "First",
    "Flow",
    "FlowCancelled",
    "FlowDefinition",
    "FlowError",
    "FlowEvent",
    "FlowFailed",
    "FlowHandle",
    "FlowManager",
    "FlowNotFound",
    "FlowSettings",
    "FlowStatus",
    "FlowStep",
    "FlowStepStatus",
    "FlowStore",
    "FlowTimedOut",
    "Flows",
    "HistoryMismatch",
    "IllegalTransition",
    "InvalidData",
    "JsonLinesFile",
    "KeyConflict",
    "Limit",
    "Permanent",
    "ResultTimedOut",
    "Retry",
    "RevisionMismatch",
    "Run",
    "SchemaOutdated",
    "SqlFlowStore",
    "StartPending",
    "StepFailed",
    "StepLost",
    "StepTimedOut",
    "StoreError",
    "Timer",
    "UnknownFlow",
    "WaitTimedOut",
    "step",
]
