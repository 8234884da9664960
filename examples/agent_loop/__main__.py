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
            asks = flow.state().get("asks")
            if asks is not None and asks not in answered:
                answered.add(asks)
                print(f"{flow.state()['calls']}?")
                decide = flow.reject if "b.txt" in flow.state()["calls"] else flow.approve
                decide(asks, by="ann")
            return flow.status().is_terminal

        await_fact(answer, worker, log, seconds=60)
        print(started.result())


def latest(flow: FlowHandle[Any]) -> FlowHandle[Any]:
    """The flow that has gone on for this one, as long as there is one."""
    while (after := flow.get().continued_as) is not None:
        flow = flows.handle(after)
    return flow


if __name__ == "__main__":
    main()
