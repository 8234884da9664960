"""Members of gathers: what a Celery signature comes to in the store and in its message, and what members are called."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, TypeAlias

from celery import Celery, Signature

from celery_flows.store.changes import Member
from celery_flows.store.errors import InvalidData
from celery_flows.store.validation import check_name, encode_json
from celery_flows.tasks.awaited import Awaited, awaited_codec, awaited_name
from celery_flows.tasks.children import ChildFlow
from celery_flows.tasks.options import StepOptions
from celery_flows.tasks.payloads import ANY, Codec, result_codec
from celery_flows.tasks.replay import Place

# What would make the broker, or Celery's canvas, the keeper of something that only the store may keep.
REFUSED_OPTIONS = ("countdown", "eta", "expires", "link", "link_error", "chord")
MAX_PRIORITY = 255  # AMQP's is a byte
LIMITS = ("time_limit", "soft_time_limit")
GRACE_SECONDS = 5.0  # for a step to end after its timeout


Remote: TypeAlias = Signature[Any] | ChildFlow[Any] | Awaited  # what runs, or is waited for, elsewhere


def task_name(signature: Any) -> str:
    """The name a Celery step goes by: its task's.

    Raises:
        InvalidData: it is no signature of a single task.
    """
    if not isinstance(signature, Signature):
        raise InvalidData("gather", f"takes task.s(…) and flow.s(…), not {type(signature).__name__}")
    if signature.subtask_type:
        raise InvalidData("step", f"a Celery {signature.subtask_type} is no step: gather its tasks instead")
    return check_name("step", signature.task)


def member_of(
    app: Celery,
    place: Place,
    signature: Signature[Any],
    given: StepOptions,
    limit: int,
    *,
    cleanup: bool = False,
    undoing: bool = False,
) -> Member:
    """The rows of a Celery step: queue, priority and time limits are the signature's, else the task's, else routed.

    A ``cleanup`` step says so, for it is run although its flow is cancelled; so does one that is ``undoing``, for it is
    not interrupted once it has begun. Its retry and timeout go with it, for
    whoever runs it; should it not heed its timeout, its process is ended some seconds later, where the pool can.

    Raises:
        InvalidData: its arguments cannot be JSON, or it has an option that a step cannot keep.
    """
    name, options = task_name(signature), dict(signature.options)
    for option in REFUSED_OPTIONS:
        if options.get(option):
            raise InvalidData(
                f"step {name}", f"has {option}=, which a step cannot keep; use run.sleep or further steps"
            )
    args, kwargs = tuple(signature.args), dict(signature.kwargs)
    task: Any = app.tasks.get(name)
    if task is not None:
        options = {**task._get_exec_options(), **options}
        if (as_celery_does := getattr(task, "_dump_pydantic_arguments", None)) is not None:  # @app.task(pydantic=True)
            args, kwargs = as_celery_does(args, kwargs)
    routed = app.amqp.router.route(dict(options), name, args, kwargs, task)
    limits = {limit_name: options[limit_name] for limit_name in LIMITS if options.get(limit_name) is not None}
    if (seconds := given.seconds) is not None:
        limits["time_limit"] = min(limits.get("time_limit", math.inf), seconds + GRACE_SECONDS)
    queue = routed.get("queue")
    priority = options.get("priority")
    if priority is not None and not (isinstance(priority, int) and 0 <= priority <= MAX_PRIORITY):
        raise InvalidData(f"step {name}", f"has a priority that is no number from 0 to {MAX_PRIORITY}")
    queue_name = getattr(queue, "name", queue)
    if queue_name is not None:
        check_name(f"queue of step {name}", queue_name)
    called: dict[str, Any] = {"args": list(args), "kwargs": kwargs, **place.kept()}
    if cleanup:
        called["cleanup"] = True
    if undoing:
        called["undoing"] = True
    if given.retry is not None:
        called["retry"] = asdict(given.retry.rule())
    if seconds is not None:
        called["timeout"] = seconds
    return Member(
        run_id=place.run_id,
        task=name,
        position=place.position,
        args=encode_json(f"arguments of step {name}", called, limit=limit),
        queue=queue_name,
        priority=priority,
        options=limits or None,
    )


def member_name(member: Remote) -> str:
    """The name a member of a gather goes by: its task's or its flow's, or what is waited for.

    Raises:
        InvalidData: it is none of these.
    """
    if isinstance(member, Awaited):
        return awaited_name(member)
    return member.definition.name if isinstance(member, ChildFlow) else task_name(member)


def codec_of(app: Celery, member: Remote) -> Codec:
    """How the member's result is read back: by the return annotation of its task's or flow's function."""
    if isinstance(member, Awaited):
        return awaited_codec(member)
    if isinstance(member, ChildFlow):
        return member.definition.output
    task = app.tasks.get(task_name(member))
    return ANY if task is None else result_codec(task.run)
