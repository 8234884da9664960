"""The examples that run by themselves, as a stranger runs them: each as a process, on servers of its own."""

from __future__ import annotations

import re
import sys

from tests.support.commandline import ROOT, Project


def said_by(name: str) -> list[str]:
    """What ``python -m examples.NAME`` prints; it must end well by itself."""
    ended = Project(ROOT, {}).run(sys.executable, "-W", "error", "-m", f"examples.{name}")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return [line.strip() for line in ended.stdout.splitlines()]


def test_two_orders_are_sent_and_one_is_undone() -> None:
    *sent, why, reserved, charged, chair, piano, recalled, refunded, released = said_by("order_fulfilment")
    assert sent == [f"sent: {what} to Elm Street 1" for what in ("a chair", "a table", "a chair", "a sofa")]
    assert why.startswith("order-3 is undone: ")
    assert "no courier carries a piano" in why
    assert (reserved, charged) == ("reserve: succeeded", "charge: succeeded")
    # The chair may be sent before the piano fails; or its flow is cancelled then, before or after its parent is told.
    assert chair.removeprefix("orders/send parcel: ") in {"succeeded", "cancelled", "failed"}
    assert piano == "orders/send parcel: failed"
    assert (recalled, refunded, released) == ("recall: succeeded", "refund: succeeded", "release: succeeded")


def test_each_slot_has_a_report() -> None:
    reports = said_by("nightly_report")
    slots = [re.fullmatch(r"slot (\S+): report of [\d-]+: \d+", line) for line in reports]
    assert len({slot.group(1) for slot in slots if slot}) == len(reports) == 3


def test_the_agent_asks_before_each_deletion() -> None:
    assert said_by("agent_loop") == [
        "delete_file a.txt? yes", "delete_file b.txt? no", "delete_file c.txt? yes", "done after 4 calls",
    ]  # fmt: skip
