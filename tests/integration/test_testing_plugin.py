"""The pytest plugin as users have it: real runs of pytest over a project of theirs."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

pytest_plugins = ["pytester"]

SHOP = """
from datetime import timedelta
from celery import Celery
from celery_flows import Flows, Run

app = Celery("shop", broker="redis://127.0.0.1:1/0", set_as_current=False)
flows = Flows(app)


def reserve(order: str) -> int:
    return 3


@flows.flow("shop/fulfil")
def fulfil(run: Run, order: str) -> str:
    boxes = run.step(reserve, order)
    run.sleep(timedelta(days=90))
    return f"{boxes} boxes, {run.wait_for('approval', order)['by']}"
"""
WITHOUT_DOCKER = ("-p", "no:celery", "-p", "no:docker_tools", "-W", "error")


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A user's project, with an app whose flows are to be tested."""
    pytester.makepyfile(shop=SHOP)
    pytester.makeini("[pytest]\nflow_app = shop\n")
    return pytester


def run(project: pytest.Pytester, test: str, *options: str, apart: bool = False) -> pytest.RunResult:
    """Runs this as the project's only tests; ``apart``: in a process of its own."""
    project.makepyfile(test_shop=test)
    ended = project.runpytest_subprocess if apart else project.runpytest_inprocess
    return ended(*(options or WITHOUT_DOCKER))


def test_a_line_of_configuration_is_all_it_takes(project: pytest.Pytester) -> None:
    ended = run(
        project,
        """
        from shop import flows, fulfil

        def test_fulfil(flow_app, flow_clock):
            handle = fulfil.start("order-1")
            flow_clock.advance(days=90)
            flows.emit("approval", "order-1", {"by": "Ada"})
            assert handle.result() == "3 boxes, Ada"

        def test_nothing_is_left_of_the_first(flow_app):
            assert flow_app.store.list_by_owner("default") == []
        """,
    )
    ended.assert_outcomes(passed=2)


def test_a_crash_that_never_struck_fails_the_test_itself(project: pytest.Pytester) -> None:
    ended = run(
        project,
        """
        from shop import fulfil

        def test_it(flow_app, flow_crash, flow_clock):
            fulfil.start("order-1")
            flow_crash.at("charge")
            flow_clock.advance(days=1)

        def test_its_own_failure_comes_first(flow_crash):
            flow_crash.at("charge")
            assert 1 == 2
        """,
    )
    ended.assert_outcomes(failed=2)
    ended.stdout.fnmatch_lines(["*NeverStruck: did not happen*flow_crash.at('charge', when='during')*ran: reserve*"])
    ended.stdout.fnmatch_lines(["*assert 1 == 2*"])


def test_a_failure_is_told_where_the_test_waits(project: pytest.Pytester) -> None:
    ended = run(
        project,
        """
        from celery_flows.testing import assert_history
        from shop import fulfil

        def test_waits(flow_app):
            fulfil.start("order-1").result()

        def test_history(flow_app):
            handle = fulfil.start("order-1")
            assert_history(handle, ["created", "started"])
        """,
    )
    ended.assert_outcomes(failed=2)
    ended.stdout.fnmatch_lines(
        [
            "E *Stuck: nothing is left to do, and these flows have not ended:",
            "E *- shop/fulfil * waits for an event that nobody has sent: flows.emit('approval', 'order-1', …)",
            "E *the history of flow * is another (- expected, + is there):",
            "E *  created",
            "E *- started",
        ]
    )
    assert "difflib" not in ended.stdout.str()  # the test's own lines are shown, not the kit's


def test_a_failed_test_tells_where_its_flows_failed(project: pytest.Pytester) -> None:
    ended = run(
        project,
        """
        from shop import Run, flows

        def divide(by):
            return 1 // by  # in the step

        @flows.flow("divides")
        def divides(run: Run) -> int:
            return run.step(divide, 0)  # in the flow

        def test_divides(flow_app):
            assert divides.start().result() == 1

        def test_nothing_is_told_of_failures_that_were_expected(flow_app):
            divides.start()
            flow_app.run()
        """,
    )
    ended.assert_outcomes(failed=1, passed=1)
    ended.stdout.fnmatch_lines(
        [
            "E *FlowFailed: flow * failed (StepFailed): StepFailed: step divide failed with ZeroDivisionError: *",
            "*Captured flows call*",
            "flow * failed:",
            "*test_shop.py*in divide",
            "*return 1 // by  # in the step",
            "ZeroDivisionError: *",
            "*test_shop.py*in divides",
            "*return run.step(divide, 0)  # in the flow",
            "celery_flows.tasks.errors.StepFailed: step divide failed with ZeroDivisionError: *",
        ]
    )
    assert ended.stdout.str().count("Captured flows call") == 1


def test_what_is_missing_is_named(project: pytest.Pytester) -> None:
    test = """
        def test_it(flow_app):
            pass
        """
    project.makepyfile(bare="from celery import Celery\napp = Celery('bare', set_as_current=False)\n")

    for app, told in {
        "": "which app has the flows? Say flow_app = shop.app:app in pytest's configuration, or override *",
        "bare:nothing": "flow_app = bare:nothing: no Celery app there (ModuleNotFoundError: *",
        "nowhere": "flow_app = nowhere: no Celery app there (ModuleNotFoundError: *",
        "bare": "*InvalidData: flow_celery_app: 'bare' has no flows: write flows = Flows(app) beside it",
    }.items():
        ended = run(project, test, *WITHOUT_DOCKER, "-o", f"flow_app={app}")
        ended.assert_outcomes(errors=1)
        ended.stdout.fnmatch_lines([f"*{told}"])


def test_who_uses_flows_without_the_fixture_or_before_it_is_told_so(project: pytest.Pytester) -> None:
    ended = run(
        project,
        """
        import pytest
        from shop import fulfil

        def test_without():
            fulfil.start("order-1")

        @pytest.fixture
        def started():
            return fulfil.start("order-1")

        def test_before(started, flow_app):
            pass
        """,
    )
    ended.assert_outcomes(failed=1, errors=1)
    told = "E *In a test the fixture flow_app gives the store: ask for it, also in each fixture that has flows."
    ended.stdout.fnmatch_lines([told, told])


def test_flows_may_be_in_modules_that_celery_finds_by_itself(project: pytest.Pytester) -> None:
    project.mkpydir("parts")
    (project.path / "parts" / "app.py").write_text(
        "from celery import Celery\napp = Celery('parts', set_as_current=False)\n"
        "app.autodiscover_tasks(['parts'], related_name='flows')\n"
    )
    (project.path / "parts" / "flows.py").write_text(
        "from celery_flows import Flows, Run\nfrom parts.app import app\nflows = Flows(app)\n"
        "@flows.flow('parts/one')\ndef one(run: Run) -> int:\n    return 1\n"
    )
    ended = run(
        project,
        """
        def test_it(flow_app):
            from parts.flows import one
            assert one.start().result() == 1
        """,
        *WITHOUT_DOCKER,
        "-o",
        "flow_app=parts.app",
    )
    ended.assert_outcomes(passed=1)


def test_the_database_can_be_given(project: pytest.Pytester, postgresql_url: str) -> None:
    ended = run(
        project,
        """
        from shop import fulfil

        def test_it(flow_app, flow_clock):
            fulfil.start("order-1")
            assert flow_app.store.engine.dialect.name == "postgresql"

        def test_it_is_emptied(flow_app):
            assert flow_app.store.list_by_owner("default") == []
        """,
        *WITHOUT_DOCKER,
        "--flow-store-url",
        postgresql_url,
    )
    ended.assert_outcomes(passed=2)


# ---- beside Celery's own plugins ------------------------------------------------------------------------------------

WITH_CELERY = ("-p", "celery.contrib.pytest")


def test_beside_celerys_own_fixtures(project: pytest.Pytester) -> None:
    ended = run(
        project,
        """
        import pytest
        from celery_flows import Flows, Run
        from shop import fulfil

        @pytest.fixture
        def flow_celery_app(celery_app):
            flows = Flows(celery_app)

            @flows.flow("doubled")
            def doubled(run: Run, number: int) -> int:
                return run.step(celery_app.tasks["double"], number)

            @celery_app.task(name="double", shared=False)
            def double(number: int) -> int:
                return 2 * number

            return flows

        def test_one_app_for_both(celery_app, flow_celery_app, flow_app, celery_worker):
            assert celery_app.tasks["double"].delay(4).get(timeout=10) == 8
            assert flow_celery_app.runtime.registry.require("doubled").start(5).result() == 10
        """,
        *WITHOUT_DOCKER,
        *WITH_CELERY,
        apart=True,
    )
    ended.assert_outcomes(passed=1)


def test_with_pytest_celery_installed_and_no_docker(project: pytest.Pytester) -> None:
    ended = run(
        project,
        """
        from shop import flows, fulfil

        def test_fulfil(flow_app, flow_clock, celery_app):
            handle = fulfil.start("order-1")
            flow_clock.advance(days=90)
            flows.emit("approval", "order-1", {"by": "Ada"})
            assert handle.result() == "3 boxes, Ada"
        """,
        "-p",
        "no:docker_tools",
        apart=True,
    )
    ended.assert_outcomes(passed=1)
    ended.stdout.fnmatch_lines(["plugins: *celery-*"])


def test_no_fixture_takes_a_name_of_celerys() -> None:
    import celery.contrib.pytest as celerys

    import _celery_flows_pytest as ours

    def fixtures(module: Any) -> set[str]:
        return {name for name, value in vars(module).items() if type(value).__name__ == "FixtureFunctionDefinition"}

    assert fixtures(ours) >= {"flow_app", "flow_clock", "flow_crash", "flow_messages", "flow_celery_app"}
    assert "celery_app" in fixtures(celerys)
    assert all(re.match("_?flow_", name) for name in fixtures(ours))
    assert not [name for name in fixtures(celerys) if re.match("_?flow_", name)]


IMPORTED = """
import sys, pytest
before = set(sys.modules)
import _celery_flows_pytest
print(*(set(sys.modules) - before))
"""


def test_those_who_have_no_flows_pay_nothing() -> None:
    ended = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, timeout=60, check=True)

    assert ended.stdout.split() == ["_celery_flows_pytest"]
