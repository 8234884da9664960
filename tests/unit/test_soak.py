"""The soak's monkey repeats itself by its seed, and its verdict sees each kind of wrong that is planted."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pytest

from celery_flows import FlowStatus, FlowStepStatus
from celery_flows.store import Flow, FlowEvent, FlowStep
from celery_flows.store.models import new_id
from tests.soak.application import BROKER, DATABASE, EFFECTS, ELSEWHERE, HERE, Kind
from tests.soak.flows import open_application
from tests.soak.monkey import WEIGHTS, Fault, strikes
from tests.soak.recovery import Recovery, Row, Struck, worst_and_median
from tests.soak.report import Verdict
from tests.soak.strikes import concerns
from tests.soak.verdict import WRONGS, Account, Judge, Line, Stop, Wrong, by_flow

NOW = 1_800_000_000.0
OURS, OTHERS = 10, 11  # processes


# ---- the monkey -----------------------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_choices_and_another_makes_others() -> None:
    first, again, other = (list(itertools.islice(strikes(seed, list(Fault), 2), 200)) for seed in (7, 7, 8))
    assert first == again != other


def test_a_long_run_of_choices_has_every_fault_that_is_possible_and_no_other() -> None:
    assert set(WEIGHTS) == set(Fault)
    possible = [fault for fault in Fault if fault is not Fault.DATABASE_CUT]
    chosen = list(itertools.islice(strikes(3, possible, 2), 1000))
    assert {strike.fault for strike in chosen} == set(possible)
    assert {strike.which for strike in chosen} == {0, 1}


def test_a_choice_does_not_depend_on_the_order_in_which_faults_are_listed() -> None:
    forwards, backwards = strikes(5, list(Fault), 2), strikes(5, list(reversed(Fault)), 2)
    assert list(itertools.islice(forwards, 50)) == list(itertools.islice(backwards, 50))


# ---- a flow that went well, to plant wrongs in ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    """The kinds of flows, by name."""
    folder = tmp_path_factory.mktemp("soak")
    places = {BROKER: "memory://", DATABASE: f"sqlite:///{folder}/none", EFFECTS: str(folder / "effects")}
    application = open_application(places)
    application.app.close()
    return {kind.name: kind for kind in application.kinds}


@dataclass
class Story:
    """A flow's rows, events and effects, a second apart."""

    kind: Kind
    flow: Flow
    steps: list[FlowStep] = field(default_factory=list)
    events: list[FlowEvent] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    revision: int = 0
    at: float = NOW

    def tell(self, kind: str, revisioned: bool, **told: Any) -> None:
        self.at += 1
        self.revision += revisioned
        self.events.append(
            FlowEvent(
                id=len(self.events) + 1, flow_id=self.flow.id, kind=kind, payload_json=told,
                at=datetime.fromtimestamp(self.at, UTC), revision=self.revision if revisioned else None,
            )
        )  # fmt: skip

    def act(self, effect: str, run_id: str, pid: int = OURS, *, inline: bool = False) -> None:
        self.at += 1
        self.lines.append(Line(effect, self.at, pid, str(self.flow.id), run_id, run_id, inline))

    def has(self, run_id: str, task: str) -> None:
        succeeded = FlowStepStatus.SUCCEEDED
        self.steps.append(
            FlowStep(flow_id=self.flow.id, run_id=run_id, task=task, status=succeeded, result_json=run_id)
        )

    def become(self, **changes: Any) -> None:
        self.flow = self.flow.but(**changes)

    def wrongs(self, *stops: Stop, judge: Judge | None = None) -> list[Wrong]:
        account = Account(self.kind, self.flow, self.steps, self.events)
        return list((judge or Judge(stops)).judge(account, self.lines))


def claimed_by(pid: int) -> str:
    """A claim's token."""
    return f"host/boot/app/{pid}/request/claim"


def good(kind: Kind, **result: Any) -> Story:
    """A flow with an inline step and a Celery step, as it should go."""
    flow = Flow(
        controller_id=kind.name, owner_session_key="soak", status=FlowStatus.FINISHED,
        result_json={"did": list(kind.did), "heard": [], **result},
    )  # fmt: skip
    story = Story(kind, flow)
    story.tell("created", True, set={"status": "created"})
    story.tell("started", True, set={"status": "running"}, worker=claimed_by(OURS))
    story.act("began", "here", inline=True)
    story.act("ended", "here", inline=True)
    story.tell("step_succeeded", True, set={}, run_id="here")
    story.has("here", HERE)
    story.tell("step_started", False, run_id="there", worker=claimed_by(OTHERS))
    story.act("began", "there", OTHERS)
    story.act("ended", "there", OTHERS)
    story.tell("step_succeeded", False, run_id="there")
    story.has("there", ELSEWHERE)
    story.tell("finished", True, set={"status": "finished"})
    return story


@pytest.fixture
def story(kinds: dict[str, Kind]) -> Story:
    return good(kinds["soak/celery"])


def told(wrongs: list[Wrong]) -> set[str]:
    return {wrong.kind for wrong in wrongs}


def test_a_flow_that_went_well_is_clean(story: Story) -> None:
    assert story.wrongs() == []


# ---- planted wrongs -------------------------------------------------------------------------------------------------


def claimed_once_more(story: Story) -> None:
    """The Celery step, by the same process."""
    story.events.insert(2, next(event for event in story.events if event.kind == "step_started"))


def is_lost(story: Story) -> None:
    story.become(status=FlowStatus.RUNNING, result_json=None)
    story.events.pop()


def ran_again(story: Story) -> None:
    story.act("began", "there", OTHERS)
    claimed_once_more(story)


def ran_after_the_flow_had_ended(story: Story) -> None:
    story.act("began", "never recorded", inline=True)


def ran_without_a_claim(story: Story) -> None:
    story.lines.insert(0, replace(story.lines[0], pid=99))


def ran_twice_for_one_claim(story: Story) -> None:
    story.lines.insert(0, replace(story.lines[2], at=NOW))


def was_recorded_but_never_ran(story: Story) -> None:
    story.lines = [line for line in story.lines if line.run_id != "there"]


def was_recorded_before_it_ended(story: Story) -> None:
    story.lines[-1] = replace(story.lines[-1], at=story.at - 0.5)


def went_on_after_its_end(story: Story) -> None:
    story.tell("resumed", True, set={"status": "running"})


def took_a_way_that_is_none(story: Story) -> None:
    started = story.events[1]
    story.events[1] = started.but(payload_json={**started.payload_json, "set": {"status": "waiting"}})


def ended_otherwise(story: Story) -> None:
    story.become(status=FlowStatus.FAILED, result_json=None)


def gave_another_result(story: Story) -> None:
    story.become(result_json={"did": ["celery 0"], "heard": []})


PLANTED: dict[Callable[[Story], None], str] = {
    is_lost: "lost",
    ran_again: "again",
    ran_after_the_flow_had_ended: "again",
    ran_without_a_claim: "unclaimed",
    ran_twice_for_one_claim: "unclaimed",
    was_recorded_but_never_ran: "unfounded",
    was_recorded_before_it_ended: "unfounded",
    went_on_after_its_end: "history",
    took_a_way_that_is_none: "history",
    ended_otherwise: "outcome",
    gave_another_result: "outcome",
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_wrong_is_told_by_its_name(story: Story, plant: Callable[[Story], None]) -> None:
    plant(story)
    assert told(story.wrongs()) == {PLANTED[plant]}


def test_a_wait_for_ever_that_ended_without_its_event_is_told(kinds: dict[str, Kind]) -> None:
    assert told(good(kinds["soak/event"], heard=[None]).wrongs()) == {"outcome"}
    assert good(kinds["soak/timeout"], heard=[None]).wrongs() == []


def test_an_event_that_two_flows_were_handed_is_told(kinds: dict[str, Kind]) -> None:
    judge = Judge(())
    assert good(kinds["soak/queue"], heard=[4]).wrongs(judge=judge) == []
    assert told(good(kinds["soak/queue"], heard=[4]).wrongs(judge=judge)) == {"event"}


def test_a_cancelled_flow_that_undid_only_half_is_told(kinds: dict[str, Kind]) -> None:
    story = good(kinds["soak/cancel"])
    story.become(status=FlowStatus.CANCELLED, result_json=None)
    story.steps = [step.but(result_json="undo") for step in story.steps[:1]]
    [wrong] = story.wrongs()
    assert (wrong.kind, "undo elsewhere" in wrong.about) == ("outcome", True)


@pytest.mark.parametrize(("recorded", "told_of"), [(1, set()), (2, {"outcome"})])
def test_a_cancel_in_the_last_step_comes_too_late_to_undo_but_not_one_before_it(
    kinds: dict[str, Kind], recorded: int, told_of: set[str]
) -> None:
    story = good(kinds["soak/cancel"])
    story.events.pop()
    story.revision -= 1
    story.become(status=FlowStatus.CANCELLED, result_json=None)
    story.tell("cancel_requested", True, set={"cancel_requested": True})
    for _ in range(recorded):
        story.tell("step_succeeded", True, set={})
    story.tell("cancelled", True, set={"status": "cancelled"})
    story.steps[0] = story.steps[0].but(result_json="done")
    assert told(story.wrongs()) == told_of


# ---- overtaken workers ----------------------------------------------------------------------------------------------


def overtaken(story: Story, thaw: float) -> Stop:
    """The worker of the Celery step begins its body after the flow's end; it was stopped until then."""
    claimed_once_more(story)
    story.act("began", "there", OTHERS)
    return Stop(OTHERS, NOW, story.at + thaw)


def test_a_worker_that_was_stopped_may_begin_one_body_as_it_goes_on(story: Story) -> None:
    judge = Judge([overtaken(story, thaw=-0.2)])
    assert story.wrongs(judge=judge) == []
    assert judge.overtaken.began == 1


def test_a_second_body_is_one_too_many(story: Story) -> None:
    stop = overtaken(story, thaw=-0.2)
    story.lines.append(replace(story.lines[-1], at=story.at + 0.1, run_id="another"))
    assert "again" in told(story.wrongs(stop))


@pytest.mark.parametrize("thaw", [-30.0, 0.5], ids=["long before", "after"])
def test_a_stop_at_another_time_explains_nothing(story: Story, thaw: float) -> None:
    assert told(story.wrongs(overtaken(story, thaw))) == {"again"}


def test_a_stop_of_another_process_explains_nothing(story: Story) -> None:
    stop = replace(overtaken(story, thaw=-0.2), pid=OURS)
    assert told(story.wrongs(stop)) == {"again"}


def test_what_was_in_hand_may_end_late_and_is_counted(story: Story) -> None:
    judge = Judge(())
    story.act("ended", "there", OTHERS)
    assert story.wrongs(judge=judge) == []
    assert judge.overtaken.ended == 1


# ---- recovery -------------------------------------------------------------------------------------------------------


def row_of(story: Story, run_id: str, kind: str) -> Row:
    return Row(run_id, str(story.flow.id), 1, kind, claimed_by(OURS))


def test_recovery_is_from_the_strike_to_the_rows_next_event(story: Story) -> None:
    started, recorded = story.events[3].at.timestamp(), story.events[4].at.timestamp()
    strike = Struck(started + 0.5, Fault.CHILD_KILLED, True, "", [row_of(story, "there", "step")])
    recovery = Recovery([strike])
    recovery.measure(str(story.flow.id), story.events)
    assert recovery.seconds(Fault.CHILD_KILLED) == [pytest.approx(recorded - started - 0.5)]
    assert recovery.seconds(Fault.WORKER_KILLED) == []
    assert [slow["run_id"] for slow in recovery.slowest_first()] == ["there"]


def test_a_request_to_cancel_is_no_recovery(story: Story) -> None:
    strike = Struck(story.at + 0.5, Fault.WORKER_KILLED, True, "", [row_of(story, str(story.flow.id), "drive")])
    story.tell("cancel_requested", True, set={"cancel_requested": True})
    story.at += 5
    story.tell("reclaimed", True, set={"status": "running"}, worker=claimed_by(OTHERS))
    recovery = Recovery([strike])
    recovery.measure(str(story.flow.id), story.events)
    assert recovery.seconds() == [pytest.approx(6.5)]


def test_work_that_was_done_already_has_no_recovery_time(story: Story) -> None:
    recovery = Recovery([Struck(story.at + 9, Fault.CHILD_KILLED, True, "", [row_of(story, "there", "step")])])
    recovery.measure(str(story.flow.id), story.events)
    assert worst_and_median(recovery.seconds())["rows"] == 0


def test_worst_and_median_are_of_all_rows() -> None:
    figures = worst_and_median([3.0, 1.0, 2.5])
    assert figures == {"rows": 3, "median_seconds": 2.5, "worst_seconds": 3.0}


@pytest.mark.parametrize(
    ("fault", "pids", "held", "waiting"),
    [
        (Fault.CHILD_KILLED, [OURS], True, False),
        (Fault.CHILD_KILLED, [OTHERS], False, False),
        (Fault.DATABASE_CUT, None, True, False),
        (Fault.MESSAGES_LOST, None, False, True),
        (Fault.BEAT_KILLED, [OURS], False, False),
    ],
)
def test_a_fault_strikes_the_rows_it_concerns(fault: Fault, pids: list[int] | None, held: bool, waiting: bool) -> None:
    by_us = Row("step", "flow", 1, "step", claimed_by(OURS))
    assert concerns(fault, by_us, pids) is held
    assert concerns(fault, replace(by_us, worker=None), pids) is waiting


# ---- the report -----------------------------------------------------------------------------------------------------


def test_the_verdict_counts_each_kind_of_wrong_and_is_json() -> None:
    assert Verdict().as_json()["clean"] is True
    verdict = Verdict(wrongs=[Wrong(kind, "planted") for kind in WRONGS] * 2)
    verdict.recovery = {fault: worst_and_median([]) for fault in (*Fault, "overall")}
    assert verdict.counts == dict.fromkeys(WRONGS, 2)
    told = json.loads(json.dumps(verdict.as_json()))
    assert (told["clean"], Counter(told["counts"].values())) == (False, {2: len(WRONGS)})
    assert sum(line.startswith("WRONG: ") for line in verdict.lines()) == 2 * len(WRONGS)


def test_the_effect_log_is_read_flow_by_flow() -> None:
    flow_id = str(new_id())
    line = {"effect": "began", "at": NOW, "pid": 1, "flow": flow_id, "run_id": "a", "label": "a", "inline": True}
    assert by_flow([line, line])[flow_id] == [Line("began", NOW, 1, flow_id, "a", "a", True)] * 2
