"""The errors: one tree, ids as attributes, and a message that says what to do next."""

from __future__ import annotations

import pickle

import pytest

from celery_flows import store
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
from celery_flows.store.models import new_id

ID = new_id()
ERRORS: list[tuple[FlowError, type[FlowError], dict[str, object], str]] = [
    (InvalidData("goal", "is too long"), FlowError, {"field": "goal", "rule": "is too long"}, "goal: is too long"),
    (KeyConflict("c", "k", ID), InvalidData, {"controller_id": "c", "key": "k", "flow_id": ID}, "use another key"),
    (FlowNotFound(ID), FlowError, {"flow_id": ID}, f"no flow {ID}"),
    (StepNotFound(ID), FlowError, {"step_id": ID}, f"no step {ID}"),
    (DuplicateFlow(ID), FlowError, {"flow_id": ID}, "stored already"),
    (DuplicateStep(ID, "r"), FlowError, {"flow_id": ID, "run_id": "r"}, "run id r already"),
    (RevisionMismatch(ID, 1, 3), FlowError, {"flow_id": ID, "expected": 1, "actual": 3}, "at revision 3, not 1: read"),
    (IllegalTransition(ID, "created", "finished"), FlowError, {"status": "created"}, "created and cannot become"),
    (AlreadyTerminal(ID, "failed", "running"), IllegalTransition, {"target": "running"}, "it has ended"),
    (CancelPending(ID, "running", "finished"), IllegalTransition, {"status": "running"}, "cancel was requested"),
    (LeaseLost("r"), FlowError, {"run_id": "r"}, "another worker took over"),
    (StartPending("c", "k"), FlowError, {"controller_id": "c", "key": "k"}, "try again"),
    (StartPending("c", None), FlowError, {"key": None}, "one of these keys: try again"),
    (StoreError("gone"), FlowError, {}, "gone"),
    (SchemaOutdated(None, "0001"), StoreError, {"found": None}, "run `celery -A APP flow migrate`"),
    (SchemaOutdated("0001", "0002"), StoreError, {"wanted": "0002"}, "at schema 0001, this version needs 0002"),
]


@pytest.mark.parametrize(("error", "parent", "attributes", "says"), ERRORS, ids=lambda value: type(value).__name__)
def test_an_error_carries_ids_and_says_what_to_do(
    error: FlowError, parent: type[FlowError], attributes: dict[str, object], says: str
) -> None:
    assert type(error).__bases__ == (parent,)
    assert {name: getattr(error, name) for name in attributes} == attributes
    assert says in str(error)


@pytest.mark.parametrize("error", [error for error, *_ in ERRORS], ids=lambda value: type(value).__name__)
def test_an_error_survives_the_way_to_another_process(error: FlowError) -> None:
    there = pickle.loads(pickle.dumps(error))
    assert (type(there), str(there), vars(there)) == (type(error), str(error), vars(error))


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    def below(root: type[FlowError]) -> set[str]:
        ours = [sub for sub in root.__subclasses__() if sub.__module__ == FlowError.__module__]
        return {name for sub in ours for name in {sub.__name__, *below(sub)}}

    assert FlowError.__doc__ is not None
    drawn = {
        word for line in FlowError.__doc__.splitlines() if "─ " in line for word in [line.split("─ ")[1].split()[0]]
    }
    assert drawn == below(FlowError)


def test_every_error_is_exported() -> None:
    assert {type(error).__name__ for error, *_ in ERRORS} | {"FlowError"} <= set(store.__all__)
    assert sorted(store.__all__) == list(store.__all__)
    assert all(hasattr(store, name) for name in store.__all__)
