"""The application under soak: what it is told, what its flows take and give, and what must come of each kind."""

from __future__ import annotations

from dataclasses import dataclass

from celery import Celery
from pydantic import BaseModel

from celery_flows import FlowDefinition, Flows, FlowStatus

# What a process of the soak is told by its environment.
BROKER, DATABASE, EFFECTS = "SOAK_BROKER", "SOAK_DATABASE", "SOAK_EFFECTS"
QUEUE = "soak"
LEASE_SECONDS = 3.0
SHORT, LONG = 0.1, LEASE_SECONDS + 1  # seconds that a body takes
FAILURES, RETRY_SECONDS = 2, 0.5  # of a step that is tried again
TOPIC = "soak"
HERE, ELSEWHERE = "work", "soak.work"  # the names of the steps: inline, and as a Celery task

FINISHED, FAILED = frozenset({FlowStatus.FINISHED}), frozenset({FlowStatus.FAILED})
CANCELLED_OR_TOO_LATE = frozenset({FlowStatus.CANCELLED, FlowStatus.FINISHED})


class Order(BaseModel):
    """What a flow is started with."""

    key: str = ""  # the correlation id of the event it waits for


class Receipt(BaseModel):
    """What a flow gives: the labels of its steps' results in order, and the events it was handed."""

    did: list[str]
    heard: list[int | None] = []  # None: it timed out


@dataclass(frozen=True)
class Kind:
    """One kind of flow, and what must come of it."""

    definition: FlowDefinition[Order, Receipt]
    did: tuple[str, ...]  # of one that finishes
    ends: frozenset[FlowStatus] = FINISHED
    hears: int = 0  # events it waits for
    shares: bool = False  # the key of its event with others of its kind
    patient: bool = True  # it waits until the event comes
    cancelled: bool = False  # by a customer, at some time
    undoes: tuple[str, ...] = ()  # what must have been done in one that was cancelled
    by_parents: bool = False  # started by other flows, not by customers

    @property
    def name(self) -> str:
        return self.definition.name


@dataclass(frozen=True)
class Application:
    """The app with its flows."""

    app: Celery
    flows: Flows
    kinds: tuple[Kind, ...]
