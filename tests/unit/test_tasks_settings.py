"""Settings: read once, validated at once, and a bad one is told in a sentence that names it and repeats no secret."""

from __future__ import annotations

import re
from typing import Any

import pytest
from celery import Celery

from celery_flows import FlowSettings, InvalidData
from celery_flows.tasks.settings import load_settings

SECRET = "hunter2"

BAD: dict[str, list[Any]] = {
    "store_url": [SECRET, f"mysql://me:{SECRET}@host/db", f"postgresql+asyncpg://me:{SECRET}@host/db", "", 7],
    "lease_seconds": [0, -1, 1e9, SECRET, None, "nan", "inf", [1]],
    "sweep_seconds": [0, -1, 1e9, SECRET],
    "sweep_limit": [0, 1.5, 10**9, SECRET],
    "republish_seconds": [0, SECRET],
    "republish_max_seconds": [0, 1e9, SECRET],
    "max_crashes": [0, 10**6, SECRET, 2.5],
    "publish_timeout_seconds": [0, 61, SECRET],
    "max_payload_bytes": [0, 10**9, SECRET],
    "timer_horizon_days": [0, -1, SECRET],
    "mirror": ["perhaps", 7],
    "mirror_silent_seconds": [0, 10**9, SECRET],
    "retain_days": [-1, 10**6, SECRET],
    "retain_failed_days": [-1, 10**6, SECRET],
    "imports": [7, [1, 2]],
    "metrics_port": [-1, 65_536, 1.5, SECRET],
    "metrics_address": [""],
    "tracing": ["perhaps", 7],
    "log_format": ["xml", 7, SECRET],
}


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FlowSettings.model_fields:
        monkeypatch.delenv(f"FLOW_{name.upper()}", raising=False)


def app(**conf: Any) -> Celery:
    made = Celery("settings", set_as_current=False)
    made.conf.update(conf)
    return made


def test_every_setting_has_cases_here() -> None:
    assert set(BAD) == set(FlowSettings.model_fields)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_is_told_in_one_sentence_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(InvalidData) as refused:
        load_settings(app(**{f"flow_{name}": value}).conf)
    said = str(refused.value)
    assert said.startswith(f"flow_{name}")
    assert "\n" not in said
    assert SECRET not in said
    assert len(said) < 300


@pytest.mark.parametrize("name", [name for name in BAD if name not in ("imports", "metrics_address")])  # of any text
def test_a_bad_value_in_the_environment_is_told_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"FLOW_{name.upper()}", SECRET)
    with pytest.raises(InvalidData) as refused:
        load_settings(app().conf)
    said = str(refused.value)
    assert f"flow_{name}" in said
    assert SECRET not in said


@pytest.mark.parametrize("name", [name for name in BAD if name != "store_url"])
def test_a_bad_value_is_told_where_to_set_it(name: str) -> None:
    with pytest.raises(InvalidData, match=f"set as flow_{name} or in the environment as FLOW_{name.upper()}"):
        load_settings(app(**{f"flow_{name}": BAD[name][0]}).conf)


def test_the_defaults_are_valid_and_hide_the_url() -> None:
    settings = load_settings(app(flow_store_url=f"postgresql://me:{SECRET}@host/db").conf)
    assert settings.lease_seconds == 30
    assert SECRET not in repr(settings)


def test_nothing_set_says_what_to_set() -> None:
    with pytest.raises(InvalidData, match="FLOW_STORE_URL in the environment, or flow_store_url on the Celery app"):
        load_settings(app().conf).require_store_url()


def test_the_environment_beats_the_app(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_STORE_URL", "sqlite:///environment")
    monkeypatch.setenv("FLOW_MAX_CRASHES", "7")
    settings = load_settings(app(flow_store_url="sqlite:///app", flow_max_crashes=3, flow_sweep_limit=9).conf)
    assert settings.store_url == "sqlite:///environment"
    assert (settings.max_crashes, settings.sweep_limit) == (7, 9)


def test_a_bad_value_on_the_app_does_not_matter_where_the_environment_has_a_good_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLOW_STORE_URL", "sqlite:///environment")
    assert load_settings(app(flow_store_url="nonsense").conf).store_url == "sqlite:///environment"


@pytest.mark.parametrize("read", ["object", "mapping"])
def test_the_usual_namespace_of_a_django_project_works(read: str) -> None:
    conf = {"CELERY_FLOW_STORE_URL": "sqlite:///namespaced", "CELERY_FLOW_LEASE_SECONDS": 12, "CELERY_TIMEZONE": "UTC"}
    made = Celery("settings", set_as_current=False)
    made.config_from_object(type("Config", (), conf) if read == "object" else conf, namespace="CELERY")
    settings = load_settings(made.conf)
    assert (settings.store_url, settings.lease_seconds) == ("sqlite:///namespaced", 12)


def test_a_namespaced_bad_value_and_unknown_key_are_told() -> None:
    for conf, said in [
        ({"CELERY_FLOW_LEASE_SECONDS": 0}, "flow_lease_seconds"),
        ({"CELERY_FLOW_LEASE_SECOND": 1}, "did you mean flow_lease_seconds?"),
    ]:
        made = Celery("settings", set_as_current=False)
        made.config_from_object(type("Config", (), conf), namespace="CELERY")
        with pytest.raises(InvalidData, match=re.escape(said)):
            load_settings(made.conf)


def test_a_config_object_with_lower_case_keys_works() -> None:
    made = Celery("settings", set_as_current=False)
    made.config_from_object(type("Config", (), {"flow_store_url": "sqlite:///lower", "timezone": "UTC"}))
    assert load_settings(made.conf).store_url == "sqlite:///lower"


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("flow_store_uri", "flow_store_url"),
        ("flow_lease_second", "flow_lease_seconds"),
        ("flow_import", "flow_imports"),
    ],
)
def test_an_unknown_key_suggests_the_near_one(key: str, near: str) -> None:
    with pytest.raises(InvalidData, match=f"{key}: is no setting; did you mean {near}"):
        load_settings(app(**{key: SECRET}).conf)


def test_an_unknown_key_that_is_near_none_is_refused_on_the_app() -> None:
    with pytest.raises(InvalidData, match=r"flow_colour: is no setting$"):
        load_settings(app(flow_colour="blue").conf)


def test_in_the_environment_only_near_misses_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_OF_SOMETHING_ELSE", "fine")
    load_settings(app().conf)
    monkeypatch.setenv("FLOW_STORE_URI", SECRET)
    with pytest.raises(InvalidData, match=r"FLOW_STORE_URI: is no setting; did you mean FLOW_STORE_URL\?$"):
        load_settings(app().conf)


def test_imports_are_a_list_or_text_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(app(flow_imports=["a", "b"]).conf).imports == ("a", "b")
    monkeypatch.setenv("FLOW_IMPORTS", " shop.flows, shop.more ,")
    assert load_settings(app().conf).imports == ("shop.flows", "shop.more")


def test_settings_are_frozen() -> None:
    settings = load_settings(app().conf)
    with pytest.raises(ValueError, match="frozen"):
        settings.lease_seconds = 1.0  # type: ignore[misc]


def test_every_setting_says_what_it_is_for() -> None:
    assert all(field.description for field in FlowSettings.model_fields.values())
