"""The pytest plugin of celery-flows. Beside the package, not in it: pytest loads it for everybody who has the package
installed, and importing anything of the package would cost them its import too."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from celery import Celery

    from celery_flows import Flows
    from celery_flows.testing import FlowApp, FlowBeat, FlowClock, FlowCrash, FlowMessages


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds what says which app is tested, over which database."""
    parser.addini("flow_app", "The Celery app whose flows are tested, as celery -A takes it: shop, or shop.app:app")
    group = parser.getgroup("celery-flows")
    group.addoption(
        "--flow-store-url",
        metavar="URL",
        help="Database for the tests of flows, emptied for each of them; without it: a new SQLite file each",
    )


@pytest.fixture
def flow_celery_app(pytestconfig: pytest.Config) -> Celery | Flows:
    """The Celery app whose flows are tested: the one that ``flow_app`` in pytest's configuration names. Override it to
    give an app, or its Flows, in any other way."""
    from celery.app.utils import find_app

    name = pytestconfig.getini("flow_app")
    if not name:
        pytest.fail(
            "which app has the flows? Say flow_app = shop.app:app in pytest's configuration, "
            "or override the fixture flow_celery_app",
            pytrace=False,
        )
    try:
        return find_app(name)
    except (ImportError, AttributeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
    pytest.fail(f"flow_app = {name}: no Celery app there ({why})", pytrace=False)


@pytest.fixture(scope="session")
def _flow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("celery-flows") / "template.sqlite"


@pytest.fixture
def flow_store_url(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> str:
    """The database of the test: ``--flow-store-url``, or a new SQLite file. Override it to give another, such as the
    test database of your application; it is emptied of flows first."""
    if given := pytestconfig.getoption("--flow-store-url"):
        return str(given)
    from celery_flows.testing import copy_template

    template: Path = request.getfixturevalue("_flow_template")
    folder: Path = request.getfixturevalue("tmp_path")
    return copy_template(template, folder / "flows.sqlite")


@pytest.fixture
def flow_app(flow_celery_app: Celery | Flows, flow_store_url: str) -> Iterator[FlowApp]:
    """Your app's flows in this process, without servers, on a clock that stands still until the test moves it."""
    from celery_flows.testing import open_flow_app

    with open_flow_app(flow_celery_app, flow_store_url) as opened:
        yield opened


@pytest.fixture
def flow_clock(flow_app: FlowApp) -> FlowClock:
    """The clock of ``flow_app``: ``flow_clock.advance(days=90)``."""
    return flow_app.clock


@pytest.fixture
def flow_beat(flow_app: FlowApp) -> FlowBeat:
    """The beat of ``flow_app``: ``flow_beat.only("reports/nightly")``."""
    return flow_app.beat


@pytest.fixture
def flow_crash(flow_app: FlowApp) -> FlowCrash:
    """Where workers die: ``flow_crash.at("charge")``."""
    return flow_app.crash


@pytest.fixture
def flow_messages(flow_app: FlowApp) -> FlowMessages:
    """The messages between store and workers: ``flow_messages.drop("charge")``."""
    return flow_app.messages


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fails a test whose crashes did not happen, as part of the test; a failed one tells what flows failed of."""
    __tracebackhide__ = True
    opened: FlowApp | None = (getattr(item, "funcargs", None) or {}).get("flow_app")
    if opened is None:
        return (yield)
    try:
        result = yield
        opened.check_struck()
        return result
    finally:
        if opened.store.failures:
            item.add_report_section("call", "flows", "\n".join(opened.store.failures))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Tells whoever has used flows without ``flow_app``, or before it, that it is what gives them a store in a test."""
    error = None if call.excinfo is None else call.excinfo.value
    if getattr(error, "field", None) == "flow_store_url" and "flow_app" not in (getattr(item, "funcargs", None) or {}):
        assert error is not None
        error.add_note(
            "In a test the fixture flow_app gives the store: ask for it, also in each fixture that has flows."
        )
    return (yield)
