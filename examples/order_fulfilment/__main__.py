"""``python -m examples.order_fulfilment``: three orders, on servers of their own unless FLOW_STORE_URL and
CELERY_BROKER_URL are set: one that is sent, one that is to be approved, one that cannot be sent."""

from __future__ import annotations

from celery_flows import FlowFailed
from examples.order_fulfilment.app import Line, Order, app, flows, fulfil
from examples.servers import servers, start_worker

SECONDS = 60.0


def main() -> None:
    with servers(app) as processes:
        start_worker(processes, "examples.order_fulfilment.app", "-Q", "orders,payments")
        small = fulfil.start(order("order-1", "a table", 1200), key="order-1")
        large = fulfil.start(order("order-2", "a sofa", 90_000), key="order-2")
        large.approve("manager", by="ann")
        lost = fulfil.start(order("order-3", "a piano", 1200), key="order-3")
        print(*small.result(SECONDS), *large.result(SECONDS), sep="\n")
        try:
            lost.result(SECONDS)
        except FlowFailed as failed:
            print(f"order-3 is undone: {failed.message}")
        for step in flows.store.list_steps(lost.id):
            print(f"  {step.task.rpartition('.')[2]}: {step.status}")


def order(order_id: str, article: str, cents: int) -> Order:
    """An order of a chair and of something else."""
    lines = [Line(article=each, count=1, cents=cents) for each in ("a chair", article)]
    return Order(id=order_id, address="Elm Street 1", lines=lines)


if __name__ == "__main__":
    main()
