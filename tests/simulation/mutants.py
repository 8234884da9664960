"""The engine's rules, taken away one at a time. Each mutant must make the simulation fail: so we know that it sees.

Not here, because one SQLite connection cannot show it, but tested with two connections on PostgreSQL
(tests/store/test_two_connections.py): rule 10, the order of locks; of rule 5, 7 and 8 what a statement re-checks under
an old snapshot; a caller's transaction that is open for long (rules 6 and 14). Rule 13 is about batches, which nobody
writes. Rule 16 is about the database's clock, which here is the world's (tests/store). Rule 17's pruning is tested in
tests/store/test_conformance_retention.py. The policies any and quorum of rule 5 are not there yet.

``HARMLESS`` are rules whose absence another rule makes up for; each says which, and is played to show it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from celery_flows.store import dispatch, inbox, limits, sqlite
from celery_flows.store import operations as op
from celery_flows.store.limits import Bounds
from celery_flows.tasks import drive as drive_module
from celery_flows.tasks import driver as driver_module
from celery_flows.tasks import emit as emit_module
from celery_flows.tasks import gather as gather_module
from celery_flows.tasks import maintenance
from celery_flows.tasks import side_by_side as side_by_side_module
from celery_flows.tasks import steps as steps_module
from celery_flows.tasks.driver import Driver
from celery_flows.tasks.gather import Gather
from celery_flows.tasks.replay import Replay
from celery_flows.tasks.side_by_side import SideBySide
from tests.simulation import plants as p
from tests.simulation.invariants import Observer
from tests.simulation.plants import Plant, nothing, then, with_arguments

Replacement = tuple[Any, str, Plant]


@dataclass(frozen=True)
class Mutant:
    """A rule that is missing: what is replaced, by what, and in which scenarios that shows."""

    name: str
    target: Any
    attribute: str
    plant: Plant  # takes what is there, gives what stands in for it
    scenarios: tuple[str, ...]
    first_seed: int = 0  # near one that shows it, to be quick; others would show it later
    also: tuple[Replacement, ...] = ()

    @contextmanager
    def planted(self) -> Iterator[None]:
        """The engine without the rule."""
        with planted((self.target, self.attribute, self.plant), *self.also):
            yield


@contextmanager
def planted(*replacements: Replacement) -> Iterator[None]:
    """The engine with some of its functions replaced."""
    with ExitStack() as patches:
        for target, attribute, plant in replacements:
            patches.enter_context(patch.object(target, attribute, plant(getattr(target, attribute))))
        yield


GATHERS = ("gather", "gather fails", "update by hand")
CANCELS = ("cancel beside a member", "cancel cleanup", "cancel failing gather")
EVENTS = ("one event", "two events", "two waiters", "event or timeout")
BY_HAND = ("fail by hand", "cancel by hand")

# A failed gather closes all its members before anything follows it, so no straggler ever meets a new join. Whether the
# counters would stand that shows without it, in flows that do not clean up meanwhile.
STRAGGLERS: Replacement = (Gather, "_first_failure", p.first_failure_at_once)
# These mean something else by open_members; what comes of it must show by itself.
COUNTED_OTHERWISE: Replacement = (Observer, "_check_count", nothing)

MUTANTS = [
    # 1: the life of a row
    Mutant("the end deletes one row only", sqlite, "_end", p.end_driver_only, BY_HAND),
    Mutant("the end leaves steps open", sqlite, "_end", p.end_rows_only, BY_HAND),
    Mutant("a child's end does not call its parent", sqlite, "_end", p.end_without_parent, ("children",)),
    Mutant("the fence begins anew after a rest", sqlite, "change", then(p.unwind_fence), GATHERS),
    # 2: the claim
    Mutant("a claim takes whatever nobody holds", sqlite, "_claimable", p.claim_what_is_free, ("retry", "sleep")),
    Mutant("a claim takes what somebody holds", sqlite, "_claimable", p.claim_anything, GATHERS),
    Mutant("a retry can be claimed before it is due", dispatch, "retry_step", then(p.publish_retry), ("retry",)),
    Mutant("an inline attempt begins before its pause has passed", Driver, "wait_until", p.nothing,
           ("pause inline retry",)),
    Mutant("an undo runs beside members", Driver, "drain", p.nothing, ("saga",)),
    Mutant("a new row is not due by itself", sqlite, "change", then(p.rest_members), GATHERS),
    Mutant("a take-over is not counted as a crash", sqlite, "_take", then(p.keep_crashes), ("inline",)),
    Mutant("a claim leaves the revision alone", sqlite, "claim_drive", then(p.keep_revision), ("inline",)),
    Mutant("what was taken over is not read", dispatch, "claim_drive", p.began_anew, ("goes back",)),
    # 3: the sweep
    Mutant("a sweep does not free expired rows", sqlite, "_swept", then(p.keep_expired_worker), GATHERS),
    Mutant("a sweep does not count lost leases", sqlite, "_swept", then(p.keep_crashes), ("inline", *GATHERS)),
    Mutant("a sweep publishes before it commits", maintenance, "sweep", p.publish_first, ("inline", *GATHERS)),
    Mutant("poison is never given up", dispatch, "sweep_due", p.never_held, ("poisoned step", "poisoned driver")),
    Mutant("a flow is given up while somebody drives it", dispatch, "fail_lost", p.give_up_flow, ("poisoned driver",)),
    Mutant("a step is given up while somebody runs it", sqlite, "complete", with_arguments(p.give_up_step),
           ("poisoned step",)),
    Mutant("progress forgives no crash", sqlite, "change", with_arguments(p.forgive_nothing), ("inline",)),
    # 4: wake and park
    Mutant("a wake ends a lease", sqlite, "_due_if_free", lambda _: lambda at, cancels: at,
           (*CANCELS, "resume by hand")),
    Mutant("a wake is not counted", sqlite, "_settle_drive_row", then(p.uncount_wake),
           ("pause", "event before the park")),
    Mutant("a completion's wake is not counted", sqlite, "complete", then(p.uncount_wake_of_join), CANCELS),
    Mutant("a wake leaves the row at rest", sqlite, "_due_if_free", p.keep_due, ("cancel sleep", "one event")),
    Mutant("a completion leaves the row at rest", sqlite, "complete", then(p.rest_all_the_same), GATHERS),
    Mutant("a park does not compare wakes", dispatch, "park", with_arguments(p.park_blindly),
           ("pause", "event before the park")),
    # 5: joins, the first four as in the models
    Mutant("X1: one counter, no group, wake at 0", sqlite, "complete", p.one_counter, ("two joins",),
           also=((sqlite, "change", then(p.set_members)), STRAGGLERS, COUNTED_OTHERWISE)),
    Mutant("X2: one counter, of the group that is waited for", sqlite, "complete", p.counter_of_own_group,
           ("cancel beside a straggler", "cancel two joins"),
           also=((sqlite, "change", then(p.set_members)), STRAGGLERS, COUNTED_OTHERWISE)),
    Mutant("X3: open members are set, not added", sqlite, "change", then(p.set_members),
           ("cancel beside a straggler", "cancel two joins"), also=(STRAGGLERS, COUNTED_OTHERWISE)),
    Mutant("X4: a join wakes by its policy only", sqlite, "complete", p.by_policy_only, CANCELS),
    Mutant("M5: a drain does not count off", dispatch, "drain", then(p.undo_drain), CANCELS, also=(COUNTED_OTHERWISE,)),
    Mutant("a completion does not ask who holds the row", sqlite, "complete", with_arguments(p.complete_whoever_asks),
           GATHERS),
    Mutant("a refused completion counts off", sqlite, "complete", then(p.count_off_refused), GATHERS),
    # 6: external events
    Mutant("an event without a look row", inbox, "emit", then(p.forget_look), EVENTS),
    Mutant("the waiter does not look", driver_module, "hand_over", p.zero, EVENTS),
    Mutant("the emitter does not look", emit_module, "hand_over", p.zero, EVENTS),
    Mutant("an event is announced, not handed over", emit_module, "hand_over", p.announce,
           ("two waiters, one cancelled",)),
    Mutant("an event stays after it was handed over", inbox, "hand_over_next", then(p.keep_in_inbox),
           ("two waiters", "two waiters, one may time out")),
    Mutant("the newest event goes first", inbox, "hand_over_next", p.newest_first, ("two events", "two waiters")),
    Mutant("a timeout is taken without a look", driver_module, "hand_over", p.hand_over_in_time_only,
           ("event or timeout",)),
    # 7, 8: conflicts and history
    Mutant("a write does not ask for the revision", sqlite, "change", with_arguments(p.write_over), ("inline",)),
    Mutant("a conflict does not compare the fence", Driver, "look_again", p.look_again_at_revision_only, ("inline",)),
    Mutant("a conflict reads fence and revision apart", Driver, "look_again", p.look_again_in_two_statements,
           ("update by hand", "cancel inline")),
    Mutant("a cancel seen in a conflict stops no write", Driver, "write", p.write_after_cancel, ("cancel inline",)),
    Mutant("history is read before the claim", drive_module, "_claimed", p.history_before_claim, ("inline",)),
    # 9: cancelling and failing drain first
    Mutant("cleanup beside running members", Driver, "drain", nothing, ("gather fails",)),
    Mutant("a drain does not wait for who is running", Driver, "drain", p.drain_without_waiting, CANCELS),
    Mutant("history is not read again after a drain", Driver, "read_history", p.history_once,
           ("cancel beside a member",)),
    Mutant("cleanup's members are cancelled too", gather_module, "member_of", p.never_cleanup, ("cancel cleanup",)),
    # 11: who holds a row; lost replies
    Mutant("a holder is known by its run id", dispatch, "_held", p.held_by_run_id, ("inline", *CANCELS)),
    Mutant("a holder is known without its worker", dispatch, "_held", p.held_by_fence, ("retry", *CANCELS)),
    Mutant("a late release or renewal is of anybody's lease", dispatch, "_update_of", p.of_everybody,
           ("inline", *GATHERS)),
    Mutant("a claim sent again does not know itself", sqlite, "_claimable", p.forget_own_token, ("inline", "gather")),
    Mutant("an event sent again is another event", inbox, "emit", with_arguments(p.another_id),
           ("two waiters", "two waiters, one may time out")),
    # 12: events
    Mutant("a change does not tell", sqlite, "_append_revision", p.zero, ("inline",)),
    Mutant("the end does not tell of the steps it closes", sqlite, "_end", p.end_silently, BY_HAND),
    # 14, 15, 17: keys, lease checks, mirrors
    Mutant("a start does not ask for the key", op, "create_flow", with_arguments(p.without_key), ("two starts",)),
    Mutant("no lease check before an inline step", Driver, "check_lease", nothing, ("inline",)),
    Mutant("no lease check before a Celery step", steps_module, "surely_held", p.trust_the_lease, GATHERS,
           first_seed=800),
    Mutant("an observation closes a step that a worker runs", op, "observe_step", p.observe_anything,
           ("observed by hand",)),
    # Async functions side by side
    Mutant("a member begins although the worker is to stop", Replay, "may_begin", p.always, ("async", "async fails")),
    Mutant("a failure is raised beside running members", SideBySide, "_settle", p.raise_at_once, ("async fails",),
           also=((side_by_side_module, "end", p.end_nothing),)),
    Mutant("a member's attempt begins before its pause has passed", side_by_side_module, "retry_at", nothing,
           ("pause async retry",)),
    # Workers that stop
    Mutant("a worker that is to stop goes on", Driver, "_hand_over_to_another_worker", nothing, ("inline",)),
    Mutant("a hand-back counts as a crash", dispatch, "hand_back_all", p.count_as_crash, ("inline", *GATHERS)),
    # Pauses
    Mutant("a pause comes before a cancel", dispatch, "claim_drive", p.refuse_paused, ("cancel paused cleanup",)),
    # Interrupts
    Mutant("an interrupted step takes the interrupt's word", dispatch, "list_to_stop", p.stop_everything,
           ("interrupt gather by mistake",)),
    Mutant("a hand-back leaves the row at rest", dispatch, "hand_back", then(p.rest_handed_back), ("inline",)),
    # Limits
    Mutant("slots are not counted", limits, "_count", p.zero, ("limited", "limited starts")),
    Mutant("starts are not counted", Bounds, "recent", p.no_starts, ("limited starts",)),
    Mutant("a parent keeps its slot while its children wait for one", Driver, "keeps_slot", p.yes, ("limited tree",)),
    Mutant("no sweep looks at limits", maintenance, "give_due", p.zero, ("end the holder by hand",)),
]  # fmt: skip


@dataclass(frozen=True)
class Harmless:
    """A rule that may be missing, and why nothing comes of it."""

    mutant: Mutant
    because: str


HARMLESS = [
    Harmless(
        Mutant("X1 alone", sqlite, "complete", p.one_counter, (*GATHERS, "two joins"),
               also=((sqlite, "change", then(p.set_members)),)),
        "no straggler meets a new join: a failed gather closes its members first",
    ),
    Harmless(
        Mutant("X2 alone", sqlite, "complete", p.counter_of_own_group, (*CANCELS, "cancel two joins"),
               also=((sqlite, "change", then(p.set_members)),)),
        "the same: the group that is waited for is the only one with members",
    ),
    Harmless(
        Mutant("X3 alone", sqlite, "change", then(p.set_members), (*CANCELS, "cancel two joins")),
        "the same: there are no members when others are added",
    ),
    Harmless(
        Mutant("joins are right although stragglers run", *STRAGGLERS, ("two joins", "cancel two joins")),
        "the counters are by group; what must not run beside members is cleanup",
    ),
    Harmless(
        Mutant("scheduling does not compare wakes", sqlite, "_park", with_arguments(p.schedule_blindly),
               (*GATHERS, *CANCELS, "pause")),
        "a wake from outside moves the revision, so the scheduling driver is refused and looks again",
    ),
    Harmless(
        Mutant("a record sent again is written again", op, "find_change", p.none_found, ("inline", "event or timeout")),
        "SQLite refuses the second row of one run id, and the flow is replayed; on PostgreSQL the event would double "
        "(tests/store/test_lost_reply.py)",
    ),
    Harmless(
        Mutant("a member is run although its flow is cancelled", steps_module, "_attempt", p.run_although_cancelled,
               CANCELS),
        "the drain waits for it like for those that had begun; it is only work in vain",
    ),
]  # fmt: skip
