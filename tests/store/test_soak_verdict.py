"""The soak's verdict over a real store: it reads what is there, and tells a history that was tampered with."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from celery_flows.store import FlowManager, SqlFlowStore
from celery_flows.store.tables import flow_events, flows
from tests.soak.application import BROKER, DATABASE, EFFECTS, Kind
from tests.soak.flows import open_application
from tests.soak.report import Verdict, reach_verdict

TAMPERED: dict[str, sa.Update | sa.Delete] = {
    "an event is gone": sa.delete(flow_events).where(flow_events.c.revision == 2),
    "a row was changed": sa.update(flows).values(goal="another"),
}


@pytest.fixture
def kind(database_url: str, tmp_path: Path) -> Kind:
    """The kind of the soak's flows that fail."""
    places = {BROKER: "memory://", DATABASE: database_url, EFFECTS: str(tmp_path / "effects")}
    application = open_application(places)
    application.app.close()
    [found] = [kind for kind in application.kinds if kind.name == "soak/failure"]
    return found


def verdict_of(store: SqlFlowStore, kind: Kind, tampering: sa.Update | sa.Delete | None = None) -> Verdict:
    """The verdict on a flow that has ended."""
    manager = FlowManager(store)
    flow = manager.create_managed(controller_id=kind.name, owner_session_key="soak")
    manager.start_running(flow.id)
    manager.fail(flow.id, "as it must")
    if tampering is not None:
        with store.engine.begin() as connection:
            connection.execute(tampering)
    return reach_verdict(store, {flow.id: kind}, {}, [], [])


def test_a_whole_history_is_clean(store: SqlFlowStore, kind: Kind) -> None:
    verdict = verdict_of(store, kind)
    assert (verdict.wrongs, verdict.ended) == ([], {"failed": 1})


@pytest.mark.parametrize("damage", TAMPERED)
def test_a_history_that_was_tampered_with_is_told(store: SqlFlowStore, kind: Kind, damage: str) -> None:
    wrongs = verdict_of(store, kind, TAMPERED[damage]).wrongs
    assert {wrong.kind for wrong in wrongs} == {"history"}
    assert len(wrongs) >= 2, "by the audit, and by a fold that is not the audit's own"
