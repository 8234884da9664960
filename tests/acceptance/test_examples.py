"""The examples, as a stranger runs them: on servers of their own."""

from __future__ import annotations

import sys

from tests.support.commandline import ROOT, Project


def run(example: str) -> list[str]:
    """What it prints."""
    ended = Project(ROOT, {}).run(sys.executable, "-W", "error", "-m", f"examples.{example}")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return [line.strip() for line in ended.stdout.splitlines()]


def test_orders_are_sent_approved_or_undone() -> None:
    *sent, failed, reserve, charge, first, second, refund, release = run("order_fulfilment")
    assert sent == [f"sent: {what} to Elm Street {number}" for number in (1, 2) for what in ("a chair", "a table")]
    assert failed == "order-3 failed: StepFailed"
    assert (reserve, charge) == ("reserve: succeeded", "charge: succeeded")
    assert "orders/send parcel: failed" in (first, second)
    assert (refund, release) == ("refund: succeeded", "release: succeeded")


def test_each_night_has_one_report() -> None:
    *reports, counts = run("nightly_report")
    assert counts == "3 slots, 3 flows"
    assert [report.split()[:2] for report in reports] == [["report", "of"]] * 3


def test_the_agent_asks_before_each_deletion_and_heeds_a_refusal() -> None:
    assert run("agent_loop") == ["delete_file a.txt?", "delete_file b.txt?", "delete_file c.txt?", "done after 4 calls"]
