"""The Celery app and its flow. The model is a plain function: put a call of yours in its place, and nothing else
changes.

What the model said is recorded like any step, so a crash in the middle of a long conversation asks it nothing again
that it has answered.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal

from celery import Celery
from pydantic import BaseModel

from celery_flows import Flows, Retry, Run, StepFailed, WaitTimedOut, step

app = Celery("agent_loop")
app.conf.update(task_default_queue="agents", worker_prefetch_multiplier=1)
flows = Flows(app)

TURNS_A_LIFE = 4  # some hundred in a real application: a flow's history is read each time it goes on
MOST_TURNS = 20


class Message(BaseModel):
    """What was said, by whom."""

    by: Literal["user", "model", "tool"]
    text: str


class Conversation(BaseModel):
    """All that the next turn needs to know: what the flow begins with, and what it starts anew with."""

    messages: list[Message]
    turn: int = 0

    def and_then(self, *messages: Message) -> Conversation:
        return Conversation(messages=[*self.messages, *messages], turn=self.turn + 1)


class Call(BaseModel):
    """What the model wants: a tool with its argument, or, without one, to be done."""

    tool: str | None = None
    text: str


# ---- the model and its tools ----


@step(retry=Retry(max_attempts=5), timeout=timedelta(minutes=2))
def ask_model(messages: list[Message]) -> Call:
    """Stands for a language model: lists the files, deletes them one by one, and is done."""
    told = [message.text for message in messages if message.by == "tool"]
    if not told:
        return Call(tool="list_files", text="/tmp/old")
    left = sorted(set(told[0].split()) - {text.split()[-1] for text in told[1:]})
    return Call(tool="delete_file", text=left[0]) if left else Call(text=f"done after {len(told)} calls")


@app.task
def list_files(folder: str) -> str:
    """A tool that only looks."""
    return "a.txt b.txt c.txt"


@app.task
def delete_file(name: str) -> str:
    """A tool that cannot be undone."""
    return f"deleted {name}"


TOOLS: dict[str, Any] = {"list_files": list_files, "delete_file": delete_file}
DANGEROUS = {"delete_file"}


# ---- the flow ----


@flows.flow("agents/converse")
def converse(run: Run, conversation: Conversation) -> str:
    """Ends with the model's last word."""
    while True:
        call = run.step(ask_model, conversation.messages)
        if call.tool is None:
            return call.text
        if conversation.turn == MOST_TURNS:
            return f"given up after {MOST_TURNS} turns"
        run.update(turn=conversation.turn, calls=f"{call.tool} {call.text}")
        said = Message(by="model", text=f"{call.tool}({call.text})")
        conversation = conversation.and_then(said, Message(by="tool", text=_outcome(run, call, conversation.turn)))
        if conversation.turn % TURNS_A_LIFE == 0:
            run.restart_as(conversation)


def _outcome(run: Run, call: Call, turn: int) -> str:
    """What the tool gave, or why it did not: the model is told either way."""
    tool = TOOLS.get(call.tool or "")
    if tool is None:
        return f"there is no {call.tool}"
    if call.tool in DANGEROUS and (refusal := _refusal(run, f"{call.tool} {turn}")):
        return f"{refusal} {call.text}"
    try:
        return str(run.step(tool, call.text))
    except StepFailed as failed:
        return f"failed with {failed.type}: {failed.message}"


def _refusal(run: Run, name: str) -> str:
    """Why a person does not want it done; empty: it may be done."""
    run.update(asks=name)
    try:
        decision = run.approval(name, timeout=timedelta(days=1))
        refusal = "" if decision.granted else f"{decision.by} does not allow"
    except WaitTimedOut:
        refusal = "nobody allowed"
    run.update(asks=None)
    return refusal
