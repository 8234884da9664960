"""``python -m examples.agent_loop``: one conversation, on servers of its own unless FLOW_STORE_URL and
CELERY_BROKER_URL are set. Somebody allows all deletions but that of b.txt."""

from __future__ import annotations

from celery_flows.worker.embedded import await_fact
from examples.agent_loop.app import Conversation, Message, app, converse
from examples.servers import servers, start_worker


def main() -> None:
    with servers(app) as processes:
        start_worker(processes, "examples.agent_loop.app")
        worker, log = processes.children["worker"], processes.log_of("worker")
        started = converse.start(Conversation(messages=[Message(by="user", text="tidy up /tmp/old")]))
        answered: set[str] = set()

        def answer() -> bool:
            state = started.state()
            asks = state.get("asks")
            if asks is not None and asks not in answered:
                answered.add(asks)
                calls = state["calls"]
                allowed = "b.txt" not in calls
                print(f"{calls}? {'yes' if allowed else 'no'}")
                (started.approve if allowed else started.reject)(asks, by="ann")
            return started.status().is_terminal

        await_fact(answer, worker, log, seconds=60)
        print(started.result())


if __name__ == "__main__":
    main()
