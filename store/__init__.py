"""The durable state: records, statuses, the stores and their managers, the errors. No Celery in here."""

from celery_flows.store.aio import AsyncFlowStore
from celery_flows.store.base import FlowStore
from celery_flows.store.errors import (
    AlreadyTerminal,
    CancelPending,
    DuplicateFlow,
    DuplicateStep,
    FlowError,
    FlowNotFound,
    IllegalTransition,
    InvalidData,
    KeyConflict,
    LeaseLost,
    RevisionMismatch,
    SchemaOutdated,
    StartPending,
    StepNotFound,
    StoreError,
)
from celery_flows.store.manager import AsyncFlowManager, FlowManager
from celery_flows.store.models import Flow, FlowEvent, FlowMode, FlowStatus, FlowStep, FlowStepStatus, StepRuntime
from celery_flows.store.sync import SqlFlowStore
from celery_flows.store.waits import ExternalEventWait, ManualWait, TimerWait

__all__ = [
    "AlreadyTerminal",
    "AsyncFlowManager",
    "AsyncFlowStore",
    "CancelPending",
    "DuplicateFlow",
    "DuplicateStep",
    "ExternalEventWait",
    "Flow",
    "FlowError",
    "FlowEvent",
    "FlowManager",
    "FlowMode",
    "FlowNotFound",
    "FlowStatus",
    "FlowStep",
    "FlowStepStatus",
    "FlowStore",
    "IllegalTransition",
    "InvalidData",
    "KeyConflict",
    "LeaseLost",
    "ManualWait",
    "RevisionMismatch",
    "SchemaOutdated",
    "SqlFlowStore",
    "StartPending",
    "StepNotFound",
    "StepRuntime",
    "StoreError",
    "TimerWait",
]
