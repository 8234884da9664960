"""``flow tail``: events as they come, by looking again and again at what is new."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from uuid import UUID

import click

from celery_flows.store import Flow, FlowNotFound, StoreError, views
from celery_flows.store.views import Told
from celery_flows.worker import output
from celery_flows.worker.cli import shapes, story, words
from celery_flows.worker.cli.arguments import FlowId, of_definition, of_owner, payloads
from celery_flows.worker.cli.command import command
from celery_flows.worker.flows import Flows
from celery_flows.worker.lifecycle import Refused

PAGE = 500
BEFORE = 1000  # ids before the newest that may be missing only because their transactions are open
LATE_SECONDS = 10.0  # a transaction that is open for longer may have its event left out


@command(prints=shapes.Event)
@click.argument("flow_id", type=FlowId(), required=False)
@click.option(
    "--events", type=click.IntRange(0, 10_000), default=10, show_default=True,
    help="How many of the last events come first.",
)  # fmt: skip
@of_owner
@of_definition
@click.option(
    "--every", type=click.FloatRange(0.1, 60), default=1.0, show_default=True, metavar="SECONDS",
    help="How often to look.",
)  # fmt: skip
@payloads
def tail(
    flows: Flows,
    flow_id: UUID | None,
    events: int,
    owner: str | None,
    definition: str | None,
    every: float,
    payloads: bool,
    as_json: bool,
) -> None:
    """Shows events as they come.

    Of one flow until it has ended, or of all flows until Ctrl-C. With --json a line an event. It only reads, and
    costs the same however long the history is.
    """
    if flow_id is not None:
        if owner or definition:
            raise Refused("--owner and --flow are for the events of all flows")
        flows.manager.get(flow_id)
    try:
        for told in _follow(flows, flow_id, events, every):
            if owner in (None, told.owner) and definition in (None, told.definition):
                _show(told, is_one=flow_id is not None, payloads=payloads, as_json=as_json)
    except KeyboardInterrupt:  # how it is ended
        return
    if flow_id is not None:
        _say_how_it_ended(flows, flow_id)


def _follow(flows: Flows, flow_id: UUID | None, last: int, every: float) -> Iterator[Told]:
    """The last events, and then what comes; ends when the flow has ended."""
    cursor = Cursor(flows, flow_id, last)
    has_ended = is_away = False
    while True:
        try:
            ending = flow_id is not None and _has_ended(flows, flow_id)
            for ids in cursor.new():
                yield from flows.store.run(views.list_told, ids)
            has_ended = has_ended or ending
        except StoreError as error:
            if not is_away:
                click.echo(f"{error}; looking again until it is back", err=True)
            is_away = True
            time.sleep(every)
            continue
        is_away = False
        if has_ended:  # it had before the look that has just been taken
            return
        time.sleep(every)


def _has_ended(flows: Flows, flow_id: UUID) -> bool:
    flow = flows.store.get(flow_id)
    return flow is None or flow.status.is_terminal


class Cursor:
    """Gives the id of each new event once. Ids are given out in order, but not committed in order: so each look goes
    back to where the highest id was some seconds ago, and leaves out what it has seen."""

    def __init__(
        self, flows: Flows, flow_id: UUID | None, last: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._flows, self._flow_id, self._clock = flows, flow_id, clock
        known = flows.store.run(views.list_last_event_ids, max(last, 1), flow_id)
        self._first = known[len(known) - last :] if last else []
        self._highest = known[-1] if known else 0
        self._floor = self._highest - BEFORE
        self._seen = {*known, *flows.store.run(views.list_event_ids, self._floor, BEFORE, flow_id)}
        self._looks: deque[tuple[float, int]] = deque([(clock(), self._highest)])

    @property
    def remembered(self) -> int:
        """How many ids it knows to be told."""
        return len(self._seen)

    def new(self) -> Iterator[list[int]]:
        """What has come since the last time, in pages."""
        if self._first:
            yield self._first
            self._first = []  # once they have been read, as below
        after = self._floor
        while ids := self._flows.store.run(views.list_event_ids, after, PAGE, self._flow_id):
            after = ids[-1]
            if new := [each for each in ids if each not in self._seen]:
                yield new
                self._seen.update(new)  # once they have been read, lest a lost database loses them
        self._highest = max(self._highest, after)
        self._looks.append((self._clock(), self._highest))
        self._forget()

    def _forget(self) -> None:
        """What was there so long ago is complete by now."""
        before = self._clock() - LATE_SECONDS
        while len(self._looks) > 1 and self._looks[1][0] <= before:
            self._looks.popleft()
        if self._looks[0][0] <= before and self._looks[0][1] > self._floor:
            self._floor = self._looks[0][1]
            self._seen = {each for each in self._seen if each > self._floor}


WIDTHS = {True: (24, 16), False: (24, 36, 20, 16)}


def _show(told: Told, *, is_one: bool, payloads: bool, as_json: bool) -> None:
    event = told.event
    if as_json:
        output.show_json(story.event_json(event, told.step, payloads=payloads), line=True)
        return
    whose = [] if is_one else [event.flow_id, told.definition]
    cells = [output.moment(event.at), *whose, event.kind, words.about(event, told.step)]
    output.show_row([*cells, story.payload(event)] if payloads else cells, WIDTHS[is_one])


def _say_how_it_ended(flows: Flows, flow_id: UUID) -> None:
    try:
        flow: Flow = flows.manager.get(flow_id)
    except FlowNotFound as error:
        click.echo(str(error), err=True)
        return
    went_on = f"; it goes on as {flow.continued_as}" if flow.continued_as else ""
    click.echo(f"{flow_id} {flow.status}{went_on}", err=True)
