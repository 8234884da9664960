"""The example of an agent: tools with and without a person's leave, a history that starts anew, an end in any case."""

from __future__ import annotations

import pytest

from celery_flows import Flow, FlowHandle, Flows, FlowStatus
from celery_flows.testing import FlowApp, FlowClock, FlowCrash
from examples.agent_loop import app as agent
from examples.agent_loop.app import Call, Conversation, Message, converse, flows

LIST, DELETE = "examples.agent_loop.app.list_files", "examples.agent_loop.app.delete_file"


@pytest.fixture
def flow_celery_app() -> Flows:
    return flows


def begin() -> FlowHandle[str]:
    return converse.start(Conversation(messages=[Message(by="user", text="tidy up /tmp/old")]))


def tools(flow_app: FlowApp) -> list[str]:
    return [name for name in flow_app.ran if name != "ask_model"]


def heard(handle: FlowHandle[str]) -> list[str]:
    """What the tools told the model up to where the last life began."""
    return [each["text"] for each in last_life(handle).input_json["messages"] if each["by"] == "tool"]


def last_life(handle: FlowHandle[str]) -> Flow:
    """The flow that went on for this one last."""
    flow = handle.get()
    while flow.continued_as is not None:
        flow = flows.handle(flow.continued_as).get()
    return flow


def test_what_is_granted_is_done_and_what_is_refused_is_not(flow_app: FlowApp) -> None:
    handle = begin()
    for turn, decide in enumerate([handle.approve, handle.reject, handle.approve], 1):
        flow_app.run()
        assert (handle.status(), handle.state()["asks"]) == (FlowStatus.WAITING, f"delete_file {turn}")
        decide(f"delete_file {turn}", by="ann")
    assert handle.result() == "done after 4 calls"
    assert tools(flow_app) == [LIST, DELETE, DELETE]
    assert heard(handle) == ["a.txt b.txt c.txt", "deleted a.txt", "ann does not allow b.txt", "deleted c.txt"]


def test_progress_is_seen_while_a_person_is_waited_for(flow_app: FlowApp) -> None:
    handle = begin()
    flow_app.run()
    assert handle.state() == {"turn": 1, "calls": "delete_file a.txt", "asks": "delete_file 1"}
    handle.approve("delete_file 1", by="ann")
    flow_app.run()
    assert handle.state() == {"turn": 2, "calls": "delete_file b.txt", "asks": "delete_file 2"}
    handle.cancel()
    flow_app.run()


def test_silence_is_a_refusal(flow_app: FlowApp, flow_clock: FlowClock) -> None:
    began, handle = flow_clock.now(), begin()
    assert handle.result() == "done after 4 calls"
    assert (flow_clock.now() - began).days == 3
    assert tools(flow_app) == [LIST]


def test_a_long_history_starts_anew_and_forgets_nothing(flow_app: FlowApp) -> None:
    handle = begin()
    for turn in (1, 2, 3):
        handle.approve(f"delete_file {turn}", by="ann")
    assert handle.result() == "done after 4 calls"
    after = last_life(handle)
    assert after.id != handle.id
    assert len(flows.store.list_steps(after.id)) < len(flows.store.list_steps(handle.id))
    assert after.input_json["turn"] == agent.TURNS_A_LIFE
    assert flow_app.ran.count("ask_model") == 5


def test_a_model_that_never_ends_is_given_up(flow_app: FlowApp, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask_model(messages: list[Message]) -> Call:
        return Call(tool="list_files", text="/")

    monkeypatch.setattr(agent, "ask_model", ask_model)
    assert begin().result() == "given up after 20 turns"
    assert tools(flow_app) == [LIST] * 20


def test_a_tool_that_there_is_not_is_told_to_the_model(flow_app: FlowApp, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask_model(messages: list[Message]) -> Call:
        told = messages[-1]
        return Call(text=told.text) if told.by == "tool" else Call(tool="format_disk", text="c:")

    monkeypatch.setattr(agent, "ask_model", ask_model)
    assert begin().result() == "there is no format_disk"
    assert tools(flow_app) == []


def test_a_tool_that_fails_is_told_to_the_model(flow_app: FlowApp, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(folder: str) -> str:
        raise PermissionError(folder)

    def ask_model(messages: list[Message]) -> Call:
        told = messages[-1]
        return Call(text=told.text) if told.by == "tool" else Call(tool="look", text="/root")

    monkeypatch.setattr(agent, "ask_model", ask_model)
    monkeypatch.setitem(agent.TOOLS, "look", look)
    assert begin().result() == "failed with PermissionError: /root"


def test_a_crash_asks_the_model_nothing_twice(flow_app: FlowApp, flow_crash: FlowCrash) -> None:
    flow_crash.at(LIST, when="during")
    assert begin().result() == "done after 4 calls"
    assert (flow_app.ran.count(LIST), flow_app.ran.count("ask_model")) == (2, 5)
