"""``python -m examples.agent_loop``: one conversation, on servers of its own unless FLOW_STORE_URL and
CELERY_BROKER_URL are set. Somebody allows all deletions but that of b.txt."""

from __future__ import annotations

from typing import Any

from celery_flows import FlowHandle
from celery_flows.worker.embedded import await_fact
from examples.agent_loop.app import Conversation, Message, app, converse, flows
from examples.servers import servers, start_worker


def main() -> None:
    with servers(app) as processes:
        start_worker(processes, "examples.agent_loop.app")
        worker, log = processes.children["worker"], processes.log_of("worker")
        started = converse.start(Conversation(messages=[Message(by="user", text="tidy up /tmp/old")]))
        answered: set[str] = set()

        def answer() -> bool:
            flow = latest(started)
            seen = flow.get()
            asks = seen.state_json.get("asks")
            if asks is not None and asks not in answered:
                answered.add(asks)
                calls = seen.state_json["calls"]
                allowed = "b.txt" not in calls
                print(f"{calls}? {'yes' if allowed else 'no'}")
                (flow.approve if allowed else flow.reject)(asks, by="ann")
            return seen.status.is_terminal and seen.continued_as is None

        await_fact(answer, worker, log, seconds=60)
        print(started.result())


def latest(flow: FlowHandle[Any]) -> FlowHandle[Any]:
    """The flow that has gone on for this one, as long as there is one."""
    while (after := flow.get().continued_as) is not None:
        flow = flows.handle(after)
    return flow


if __name__ == "__main__":
    main()
