"""Run ids: the same for the same step of the same flow, in every process and for ever. They are stored."""

from __future__ import annotations

from functools import partial
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_flows import InvalidData
from celery_flows.tasks.inline import step_name
from celery_flows.tasks.replay import run_id_of
from celery_flows.tasks.runtime import worker_token

FLOW = UUID("01a20bf6-0bb1-76f5-b66c-89f0aaba3a44")


def test_run_ids_do_not_change_between_releases() -> None:
    """Histories in the database hold these: another formula would run every recorded step again."""
    assert run_id_of(FLOW, "charge", 1) == "1c67e054-f199-5959-9d10-0c8078f5c0bd"
    assert run_id_of(FLOW, "charge", 2) == "bab334d6-04fd-5468-8420-8275e9995180"
    assert run_id_of(FLOW, "größe", 1) == "ab1ceae6-0dd2-53d8-a181-1a5fefb46466"


@given(st.uuids(), st.text(max_size=30), st.integers(1, 10**6))
def test_run_ids_are_uuids_of_flow_name_and_count(flow_id: UUID, name: str, count: int) -> None:
    run_id = run_id_of(flow_id, name, count)
    assert str(UUID(run_id)) == run_id
    assert run_id == run_id_of(flow_id, name, count)
    assert run_id not in {run_id_of(flow_id, name, count + 1), run_id_of(flow_id, name + "x", count), str(flow_id)}


class Packs:
    def __call__(self) -> None: ...
    def method(self) -> None: ...


@pytest.mark.parametrize(
    ("work", "name"),
    [(len, "len"), (step_name, "step_name"), (partial(len, [1]), "len"), (Packs().method, "method"), (Packs(), "Packs"),
     (lambda: 1, "<lambda>")],
)  # fmt: skip
def test_a_step_goes_by_its_functions_name(work: object, name: str) -> None:
    assert step_name(work) == name  # type: ignore[arg-type]


def test_a_name_that_cannot_be_stored_is_refused() -> None:
    def work() -> None: ...

    work.__name__ = "x" * 500
    with pytest.raises(InvalidData, match=r"^step: is 500 characters long"):
        step_name(work)


def test_no_two_claims_share_a_token() -> None:
    tokens = {worker_token(pid, request) for pid in (1, 11) for request in ("1/a", "a", "b")}
    assert len(tokens) == 6
    assert worker_token(1, "a") == worker_token(1, "a")
