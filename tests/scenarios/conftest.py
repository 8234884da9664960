"""Fixtures for the scenarios: each test file is about the flows of the module that it is named after."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from celery_flows import Flows
from tests.scenarios.outside import EFFECTS, Outside, outside


@pytest.fixture
def flow_celery_app(request: pytest.FixtureRequest) -> Flows:
    """What the kit asks for."""
    flows: Flows = import_module(request.module.__name__.replace("test_", "")).flows
    return flows


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Outside:
    """What is outside of the flows, and has done nothing yet."""
    monkeypatch.setenv(EFFECTS, "")
    outside.begin(tmp_path / "effects.jsonl")
    return outside
